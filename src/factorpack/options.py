"""How a model is to be compressed."""

from collections.abc import Callable
from dataclasses import dataclass

from factorpack.errors import UnsupportedError
from factorpack.plan import FORMS, RANK_RULES
from factorpack.solve.projected_gradient import FORMS as DESCENT_FORMS
from factorpack.workers import check_jobs

SOLVERS = ("sequential", "projected-gradient")

Progress = Callable[[str, int, int], None]
"""Told of a stage's name, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Options:
    """How a model is compressed: a form (or "auto"), a solver, a seed, patterns of names to be kept exactly.

    `keep_batch_norms` stores all four numbers a channel, for training to go on; two say the same in eval mode. `rank`
    says what decides the rank of form `svd`: "rate", the λ that leads to it, or "vbmf" (`solve.vbmf`), at any λ alike.

    `jobs` is how many cores are used, by processes and by threads; `cluster` the address of a Dask scheduler, as
    "tcp://HOST:PORT", whose workers then take the place of the processes. The bytes depend on neither.

    Raises UnsupportedError for a form, solver or rule of ranks that does not exist, or one of these without its forms,
    and for what is no number of jobs or no address.
    """

    form: str = "auto"
    solver: str = "sequential"
    seed: int = 0
    exclude: tuple[str, ...] = ()
    keep_batch_norms: bool = False
    rank: str = "rate"
    jobs: int = 1
    cluster: str = ""

    def __post_init__(self) -> None:
        if self.form not in ("auto", *FORMS):
            raise UnsupportedError(f"{self.form!r} is no form: choose auto, {', '.join(FORMS)}")
        if self.solver not in SOLVERS:
            raise UnsupportedError(f"{self.solver!r} is no solver: choose {' or '.join(SOLVERS)}")
        if self.solver == "projected-gradient" and self.form not in DESCENT_FORMS:
            raise UnsupportedError(f"projected gradients need a form: choose --form {', '.join(DESCENT_FORMS)}")
        if self.rank not in RANK_RULES:
            raise UnsupportedError(f"{self.rank!r} is no rule for ranks: choose {' or '.join(RANK_RULES)}")
        if self.rank != "rate" and (self.form, self.solver) != ("svd", "sequential"):
            raise UnsupportedError(
                f"ranks by {self.rank} are for form svd by sequential rounding: choose --form svd, or --rank rate"
            )
        check_jobs(self.jobs, self.cluster)
