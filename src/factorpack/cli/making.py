"""Commands that make files: from a network, or from a file that is trained."""

import shlex
import time
from dataclasses import asdict, replace
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from factorpack.bars import bars
from factorpack.cli.shared import (
    Cluster,
    Exclude,
    FileArgument,
    Form,
    Jobs,
    Json,
    Seed,
    TaskArgument,
    app,
    check_folder,
    command,
    note,
    notes,
    print_json,
    read_plan,
    score_of,
    scores_told,
    screen,
    waiting,
)
from factorpack.errors import UnsupportedError
from factorpack.sizes import human, parse_size

if TYPE_CHECKING:
    from factorpack.container import Bill
    from factorpack.curve import Kept
    from factorpack.hf.folder import Folder
    from factorpack.pipeline import Source
    from factorpack.task import Task


def _source(spec: str, scored: str = "") -> tuple["Task | None", "Source"]:
    """The task (None for bare weights) and what of it is compressed; what is to be `scored` takes no bare weights."""
    from factorpack.curve import require_scores
    from factorpack.nn.stored import holds_weights_alone, stored_tensors
    from factorpack.pipeline import Source
    from factorpack.task import load_task

    if holds_weights_alone(spec) and not scored:
        return None, Source(stored_tensors(Path(spec)))
    task = load_task(spec)
    if scored:
        require_scores(task, scored)
    if not task.has("calibration"):
        notes.print(f"{escape(task.name)} has no calibration(): compressing without data", highlight=False)
    return task, Source.of(task)


def _folder_source(folder: "Folder", calibrate: Path | None, seed: int, scored: bool) -> "Source":
    """What of a folder of Hugging Face is compressed: with calibration data its network, without its weights alone."""
    from factorpack.nn.stored import stored_tensors
    from factorpack.pipeline import Source

    if scored:
        raise UnsupportedError("a folder of Hugging Face has no evaluate(), which --max-drop needs: write a task file")
    if folder.method:
        raise UnsupportedError(f"{folder.path} is quantized already ({folder.method}): give the original weights")
    if calibrate is None:
        note("without --calibrate (a text file, one sentence a line, or a folder of images) a file costs much more")
        return Source(stored_tensors(folder.root))
    from factorpack.hf.calibration import calibrated

    with waiting("loading the network"):
        return calibrated(folder, calibrate, seed)


def _check_goal(size: str, ratio: float, max_drop: float | None, plan: Path | None) -> None:
    """Just one of them says how small."""
    from factorpack.curve import check_drop

    if bool(size) + bool(ratio) + (max_drop is not None) + (plan is not None) != 1:
        raise UnsupportedError(
            "say how small, in one way: either --size 60KB or --ratio 18, or --max-drop 1, or --plan plan.json"
        )
    if ratio and not 0 < ratio < float("inf"):
        raise UnsupportedError(f"--ratio is a positive number, not {ratio}")
    if max_drop is not None:
        check_drop(max_drop)


@app.command(
    epilog="Example: factorpack compress task.py --size 60KB --out model.fpk, or "
    "factorpack compress my-encoder --calibrate sentences.txt --size 5MB --out small-encoder"
)
@command
def compress(
    task: TaskArgument,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE.fpk|DIR",
            help="The file to write; of a Hugging Face folder, a folder that is ready for use, or the file alone where "
            "the name ends in .fpk.",
        ),
    ],
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="For a Hugging Face folder: a text file, one sentence a line, or a folder of images; a few hundred "
            "are drawn of it.",
        ),
    ] = None,
    size: Annotated[str, typer.Option(help="Size of the whole file: 60KB, 5.5MB; kB = 1,000 bytes.")] = "",
    ratio: Annotated[float, typer.Option(help="Instead of --size: times smaller than the original tensors.")] = 0.0,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Instead of --size: the smallest file whose first score is at most that much lower."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="PLAN.json",
            help="Instead of --size: what a plan says, as saved or with other forms (not vq) and rates. Half the rate "
            "of a layer, its λ, is √2 times finer; the outer rate is that of small tensors; the rest is not read.",
        ),
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="Write what was decided for each weight.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the analysis of this model there: a run that was stopped goes on where it was, and any further "
            "size takes far less time.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where a run with it, or with the same --cache, was stopped; keeps its work in FILE.fpk.cache "
            "where no --cache is given. The folder stays: any further size then takes far less time.",
        ),
    ] = False,
    form: Form = "auto",
    solver: Annotated[str, typer.Option(help="sequential, or projected-gradient with a form.")] = "sequential",
    rank: Annotated[
        str, typer.Option(help="Ranks of form svd: rate, as the size asks, or vbmf, as variational Bayes finds.")
    ] = "rate",
    seed: Seed = 0,
    exclude: Exclude = None,
    keep_batch_norms: Annotated[
        bool,
        typer.Option("--keep-batch-norms", help="Store all four numbers a channel of them, for training to go on."),
    ] = False,
    jobs: Jobs = 1,
    cluster: Cluster = "",
    as_json: Json = False,
) -> None:
    """Compress a trained network to a file of at most the size that is asked for."""
    from factorpack.container import write
    from factorpack.curve import Goal, Workshop
    from factorpack.hf.folder import check_target, read_folder, write_around
    from factorpack.options import Options
    from factorpack.pipeline import dense_bytes, finish

    _check_goal(size, ratio, max_drop, plan)
    check_folder(out, "--out")
    check_folder(save_plan, "--save-plan")
    if plan is not None and (form, solver, rank) != ("auto", "sequential", "rate"):
        raise UnsupportedError("a plan says the form of each weight: leave --form, --solver and --rank out")
    if resume and cache is None:
        cache = out.with_name(out.name + ".cache")
    if resume and cache is not None and not cache.exists():
        note(f"there is nothing to resume in {cache}: the run begins anew, and can be gone on with from now on")
    goal = Goal(parse_size(size) if size else 0, ratio, max_drop, read_plan(plan) if plan else None)
    options = Options(form, solver, seed, tuple(exclude or ()), keep_batch_norms, rank, jobs, cluster)
    folder = read_folder(Path(task))
    whole = folder is not None and out.suffix != ".fpk"
    if calibrate is not None and folder is None:
        raise UnsupportedError(f"--calibrate is for folders of Hugging Face, and {task} is none: leave it out")
    if folder is not None and whole:
        check_target(out, folder)
    start = time.perf_counter()
    if folder is not None:
        loaded, source = None, _folder_source(folder, calibrate, seed, max_drop is not None)
    with bars(notes) as progress:
        if folder is None:
            loaded, source = _source(task, "--max-drop" if max_drop is not None else "")
        packed, state, kept = Workshop(source, options, cache, progress, note).made(goal, loaded)
        seconds = time.perf_counter() - start
    if save_plan is not None:
        write(save_plan, packed.plan.to_json().encode())
    score = (lambda path: score_of(loaded, path)) if loaded is not None and loaded.has("evaluate") else None
    file = out
    if folder is not None and whole:
        file = write_around(folder, out, state.dtypes, state.aliases, dense_bytes(state))
    if kept is None:
        report = finish(packed, state, seconds, score, file).report
    else:
        # These bytes were scored already.
        report = finish(packed, state, seconds - kept.evaluation_seconds, None, file).report
        report = replace(report, scores=kept.scores, evaluation_seconds=kept.evaluation_seconds)
    for name in report.unseen:
        notes.print(f"note: {escape(name)} was not met in calibration; it is stored by relative error", highlight=False)
    screen.print(
        f"{file}: {report.size_bytes:,} bytes, {report.ratio:.1f} times smaller, {report.seconds:.0f} s",
        highlight=False,
    )
    if report.bits_per_weight is not None:
        screen.print(_bits(report.bits_per_weight, report.gaussian_bits_per_weight), highlight=False)
    if report.scores:
        screen.print(f"scores of the file, loaded back: {scores_told(dict(report.scores))}", highlight=False)
    if kept is not None:
        _print_kept(kept)
    found = {
        "file": str(file), "size_bytes": report.size_bytes, "ratio": report.ratio, "seconds": report.seconds,
        "evaluation_seconds": report.evaluation_seconds, "scores": report.scores,
        "predicted_loss": report.distortion, "bits_per_weight": report.bits_per_weight,
        "gaussian_bits_per_weight": report.gaussian_bits_per_weight, "forms": _forms(report.bill),
        "unseen": report.unseen,
    }  # fmt: skip
    if kept is not None:
        found |= {
            "original": kept.original, "drop": kept.drop, "evaluations": kept.evaluations,
            "score_spread": kept.score_spread,
        }  # fmt: skip
    print_json(found, as_json)


def _bits(stored: float, gaussian: float | None) -> str:
    reference = "" if gaussian is None else f"; Gaussian reference {gaussian:.2f} at the same loss"
    return f"{stored:.2f} bits a weight{reference}"


def _print_kept(kept: "Kept") -> None:
    name, original = next(iter(kept.original.items()))
    screen.print(f"{name} of the original {original:.4g}, {kept.drop:.3g} lower in the file", highlight=False)
    screen.print(
        f"This file was chosen by its {name} on the data of evaluate(), out of {kept.evaluations} files that were "
        f"scored: its score there is not an unbiased one. It varies by {kept.score_spread:.2g} (standard deviation) "
        f"between this file and two that are 0.7 % and 1.4 % smaller. Score it on other data before you quote it.",
        highlight=False,
        soft_wrap=True,
    )


@app.command(epilog="Example: factorpack curve task.py --out sizes")
@command
def curve(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the files, curve.json and curve.png.")],
    points: Annotated[int, typer.Option(help="Number of sizes, evenly spaced in their log.")] = 8,
    size: Annotated[
        list[str] | None, typer.Option(help="Instead of --points: 60KB, 5.5MB; may be repeated, for each size.")
    ] = None,
    form: Form = "auto",
    seed: Seed = 0,
    exclude: Exclude = None,
    jobs: Jobs = 1,
    cluster: Cluster = "",
    as_json: Json = False,
) -> None:
    """Make and score files of several sizes from one analysis; a run that was stopped goes on where it was."""
    from factorpack.cache import analyse
    from factorpack.curve import check_points, draw_curve, require_plots, sizes_between
    from factorpack.options import Options
    from factorpack.workers import working

    require_plots()
    check_points(points)
    sizes = sorted({parse_size(text) for text in size or ()})
    options = Options(form, "sequential", seed, tuple(exclude or ()), jobs=jobs, cluster=cluster)
    with working(jobs, cluster) as workers, bars(notes) as progress:
        loaded, source = _source(task, "a curve")
        assert loaded is not None
        analysis = analyse(source, options, out, progress, note, workers)

        def again(wanted: int) -> str:
            chosen = [part for pattern in options.exclude for part in ("--exclude", pattern)]
            chosen += ["--form", form] if form != "auto" else []
            chosen += ["--seed", str(seed)] if seed else []
            file = str(out / f"{wanted}.fpk")
            return shlex.join(
                ["factorpack", "compress", task, "--size", str(wanted), "--cache", str(out), *chosen, "--out", file]
            )

        sizes = sizes or sizes_between(analysis.reach, points)
        found = draw_curve(loaded, analysis, out, sizes, again, progress)
    table = Table("size", *found.original, "seconds")
    for point in found.points:
        scores = [f"{point.scores[name]:.4g}" if name in point.scores else "-" for name in found.original]
        table.add_row(human(point.size_bytes), *scores, f"{point.seconds:.1f}")
    table.add_section()
    table.add_row("original", *(f"{value:.4g}" for value in found.original.values()), "")
    screen.print(table)
    screen.print(f"{out / 'curve.json'}, {out / 'curve.png'}", highlight=False, soft_wrap=True)
    print_json(asdict(found), as_json)


def _forms(bill: "Bill") -> dict[str, int]:
    """Parameters by form."""
    found: dict[str, int] = {}
    for weight in bill.weights:
        found[weight.form] = found.get(weight.form, 0) + prod(weight.shape)
    return found


@app.command(epilog="Example: factorpack finetune task.py model.fpk --minutes 30 --out trained.fpk")
@command
def finetune(
    task: TaskArgument,
    file: FileArgument,
    out: Annotated[Path, typer.Option(metavar="FILE2.fpk", help="The file to write; FILE2.fpk.training gets a log.")],
    size: Annotated[str, typer.Option(help="Size of the new file: 60KB, 5.5MB; that of the old one without.")] = "",
    minutes: Annotated[float | None, typer.Option(help="How long to train.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Instead of --minutes: how often to go through the data.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of --minutes: how many batches to train on.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="At its highest, in steps of the codes' grids; without, the longer the training the lower."),
    ] = None,
    distil: Annotated[
        float | None,
        typer.Option(
            help="Share of distillation from the original network beside the task's loss(); 0 where there are targets "
            "and a loss(), 1 otherwise."
        ),
    ] = None,
    compare: Annotated[
        str,
        typer.Option(
            help="How outputs are compared in the distillation: divergence or squares of logits, cosine of embeddings; "
            "auto is divergence or cosine."
        ),
    ] = "auto",
    features: Annotated[
        float, typer.Option(help="Weight of the outputs of the network's blocks in the distillation.")
    ] = 1.0,
    orthogonality: Annotated[
        float, typer.Option(help="Weight of the squared cosines between columns of a basis in the loss.")
    ] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, no (float32), bf16 or fp16.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run with the same options was stopped.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train what is in a compressed file, end to end, and keep the best file of the size.

    The network learns from the task's training(epoch). Ctrl-C leaves the best file so far.
    """
    from factorpack.task import load_task
    from factorpack.training import Run
    from factorpack.training_options import Lessons, TrainingOptions

    check_folder(out, "--out")
    options = TrainingOptions(
        parse_size(size) if size else None, steps, epochs, minutes, learning_rate, distil, compare, features,
        orthogonality, device, precision, resume,
    )  # fmt: skip
    loaded = load_task(task)
    with bars(notes) as progress:
        run = Run(loaded.model(), file, out, Lessons(loaded.training, loaded.loss, loaded.output), options, progress,
                  note)  # fmt: skip
        try:
            run.train()
        except KeyboardInterrupt:
            if not isfinite(run.state.held_loss):
                raise
            note(f"stopped: {out} is the best file so far; --resume goes on")
    if not run.accelerator.is_main_process:
        return
    report = run.report(None)
    if loaded.has("evaluate"):
        start = time.perf_counter()
        report = replace(report, scores=score_of(loaded, out), evaluation_seconds=time.perf_counter() - start)
    screen.print(
        f"{out}: {report.size_bytes:,} bytes, {report.ratio:.1f} times smaller, {report.seconds:.0f} s, {report.steps} "
        f"steps; held-out loss {report.held_loss_before:.4g} before, {report.held_loss:.4g} after step "
        f"{report.best_step}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if report.scores:
        screen.print(f"scores of the file, loaded back: {scores_told(dict(report.scores))}", highlight=False)
    before = report.held_loss_before if isfinite(report.held_loss_before) else None
    print_json({"file": str(out)} | asdict(report) | {"held_loss_before": before}, as_json)
    if not report.complete:
        raise typer.Exit(130)
