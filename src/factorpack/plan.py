"""The plan: what was decided for each tensor. Data, kept as strict JSON; never derived again.

`ModelPlan.to_json` writes it and `ModelPlan.from_json` takes it back, edited or not; an unknown key is an error.

A file is made of a plan by its forms and rates: `form` of a layer may be any that λ leads to (all but vq), `rate` is
its λ, and half of it makes its step √2 times finer; the `rate` of the whole is that of the small tensors. `seed` is
that of the statistics, `rank_by` the rule that ranks of form `svd` follow. The other keys tell what came of it, and are
not read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from factorpack.errors import MismatchError

FORMS = ("direct", "sparse_pca", "svd", "vq", "separable")
RANK_RULES = ("rate", "vbmf")
"""What decides the rank of form `svd`: λ, or the directions that variational Bayes tells from noise (`solve.vbmf`)."""


@dataclass(frozen=True)
class LayerPlan:
    """One weight: form, step of its codes (the first of several), rank of its basis, depth of its tiles (0: outputs).

    `rate` is the λ it was solved at, loss a bit; `size_bytes` what its record was predicted to take; `loss` half its
    distortion.
    """

    form: str
    step: float
    rank: int
    depth: int
    rate: float
    size_bytes: int
    loss: float

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise MismatchError(f"{self.form!r} is no form: choose among {', '.join(FORMS)}")


@dataclass(frozen=True)
class ModelPlan:
    """All weights by name, and what held for the whole file.

    `rate` is the λ of the small tensors; `behind_prefix` tells whether each layer was solved on the inputs that the
    compressed layers before it leave, or by itself; `rank_by` is one of `RANK_RULES`.
    """

    layers: Mapping[str, LayerPlan]
    rate: float
    seed: int
    size_bytes: int
    behind_prefix: bool
    rank_by: str = "rate"

    def __post_init__(self) -> None:
        if self.rank_by not in RANK_RULES:
            raise MismatchError(f"the plan: rank_by is {self.rank_by!r}: choose {' or '.join(RANK_RULES)}")

    def to_json(self) -> str:
        """Strict JSON, one line a weight."""
        layers = ",\n".join(f"  {json.dumps(name)}: {json.dumps(asdict(plan))}" for name, plan in self.layers.items())
        head = json.dumps(
            {key: getattr(self, key) for key in ("rate", "seed", "size_bytes", "behind_prefix", "rank_by")}
        )
        return f'{head[:-1]}, "layers": {{\n{layers}\n}}}}\n'

    @classmethod
    def from_json(cls, text: str) -> "ModelPlan":
        """The plan that `to_json` wrote; MismatchError where a key is missing, unknown or of the wrong type."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise MismatchError(f"a plan is JSON: {error}") from error
        whole = _strict(cls, data, "the plan")
        if not isinstance(whole["layers"], dict):
            raise MismatchError("the plan's layers are not a mapping of names")
        layers = {name: LayerPlan(**_strict(LayerPlan, layer, name)) for name, layer in whole["layers"].items()}
        return cls(**whole | {"layers": layers})


def _strict(kind: type, data: object, what: str) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        raise MismatchError(f"{what} must have just the keys {', '.join(sorted(names))}")
    for field in fields(kind):
        value = data[field.name]
        wrong = field.type is int and (not isinstance(value, int) or isinstance(value, bool))
        wrong |= field.type is float and (not isinstance(value, int | float) or isinstance(value, bool))
        wrong |= field.type is bool and not isinstance(value, bool)
        wrong |= field.type is str and not isinstance(value, str)
        if wrong:
            raise MismatchError(f"{what}: {field.name} is {value!r}, not {getattr(field.type, '__name__', field.type)}")
    return data
