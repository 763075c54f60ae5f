"""Commands that look at files, score them, or write them as something else."""

from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from factorpack.bars import bars
from factorpack.cli.shared import (
    FileArgument,
    Json,
    TaskArgument,
    app,
    check_folder,
    command,
    exports,
    note,
    notes,
    print_json,
    read_plan,
    score_of,
    scores_told,
    screen,
    waiting,
)
from factorpack.errors import TaskError, UnsupportedError
from factorpack.sizes import human

if TYPE_CHECKING:
    from factorpack.bench.results import Results
    from factorpack.task import Scores


@app.command(epilog="Example: factorpack bench task.py --peers factorpack,nncodec,palette:4 --out results")
@command
def bench(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Task files (.py) that can be scored.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of TASK.json, TASK.png and TASK.html.")],
    peers: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Names with commas between them; NAME:SETTING for one point alone, such as nncodec:-24.",
        ),
    ] = "all",
    as_json: Json = False,
) -> None:
    """Measure Factorpack and its peers on the same networks, data and machine, and draw size against score.

    Each peer has an environment of its own in .bench, which is made when it is first needed. What is measured already
    is not measured again: a run that was stopped goes on where it was.
    """
    from factorpack.bench.page import page
    from factorpack.bench.plots import plot
    from factorpack.bench.registry import parse_peers
    from factorpack.bench.runs import Bench, run_all
    from factorpack.container import make_folder, write
    from factorpack.curve import require_plots

    require_plots()
    runs = parse_peers(peers)
    make_folder(out)
    benches = [Bench(task, out) for task in tasks]

    def draw(results: "Results") -> None:
        write(out / f"{results.name}.png", plot(results))
        write(out / f"{results.name}.html", page(results).encode())
        screen.print(f"{out / results.name}.json, .png, .html", highlight=False, soft_wrap=True)

    found = run_all(benches, runs, lambda line: notes.print(escape(line), highlight=False, soft_wrap=True), draw)
    print_json({"tasks": [asdict(results) for results in found]}, as_json)


@app.command(epilog="Example: factorpack evaluate task.py model.fpk")
@command
def evaluate(
    task: TaskArgument,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE.fpk]", help="A compressed file.")] = None,
    as_json: Json = False,
) -> None:
    """Score the original network and, beside it, the one that is loaded back from a file."""
    from factorpack.task import load_task

    loaded = load_task(task)
    size = None
    scores: Scores = {}
    if file is not None:
        scores = score_of(loaded, file)
        size = file.stat().st_size
    with waiting("evaluating the original"):
        original = loaded.evaluate(loaded.model())
    table = Table("score", "original", *([str(file)] if file else []))
    for name, value in original.items():
        table.add_row(name, f"{value:.4f}", *([f"{scores[name]:.4f}" if name in scores else "-"] if file else []))
    screen.print(table)
    print_json({"size_bytes": size, "scores": scores, "original": original}, as_json)


@app.command(epilog="Example: factorpack inspect model.fpk")
@command
def inspect(file: FileArgument, as_json: Json = False) -> None:
    """Show where the bytes of a file are; the bill adds up to the file's size."""
    from factorpack.container import File

    opened = File(file)
    with waiting("decoding"):
        bill = opened.bill()
    table = Table("tensor", "form", "shape", "codes", "basis", "tables", "steps", "check", "bytes", "bits/weight")
    for column in table.columns[3:]:
        column.justify = "right"
    for weight in bill.weights:
        parts = [weight.parts.get(part, 0) for part in ("codes", "basis", "tables", "steps", "checksums")]
        bits = 8 * weight.size_bytes / prod(weight.shape)
        shape = "x".join(map(str, weight.shape))
        table.add_row(weight.name, weight.form, shape, *map(str, parts), str(weight.size_bytes), f"{bits:.2f}")
    table.add_section()
    for part, value in bill.shared.items():
        table.add_row(f"{part} ({len(opened.small)})" if part == "small tensors" else part, *[""] * 7, str(value), "")
    table.add_section()
    table.add_row("file", *[""] * 7, str(bill.size_bytes), "")
    (screen if screen.is_terminal else Console(width=max(screen.width, 150), markup=False)).print(table)
    weights = [asdict(w) | {"size_bytes": w.size_bytes} for w in bill.weights]
    print_json({"size_bytes": bill.size_bytes, "parts": bill.parts, "weights": weights, "shared": bill.shared}, as_json)


@app.command(epilog="Example: factorpack report model.fpk --task task.py --out report.html")
@command
def report(
    file: FileArgument,
    out: Annotated[Path, typer.Option(metavar="REPORT.html", help="The page to write; it needs nothing beside it.")],
    task: Annotated[
        str, typer.Option(metavar="TASK", help="What the file was made from: then the page tells what that lost.")
    ] = "",
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="What compress --save-plan wrote: seed and command.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a page on a file: bytes, codes and, beside the original, losses of each layer and scores."""
    from factorpack.container import write
    from factorpack.reporting import Subject, measured, original_of

    check_folder(out, "--out")
    decided = read_plan(plan) if plan else None
    with bars(notes) as progress:
        found = measured(Subject(file, original_of(task) if task else None, decided, plan, out), progress)
    write(out, found.to_html().encode())
    screen.print(f"{out}: {len(found.layers)} layers, {found.size_bytes:,} bytes", highlight=False, soft_wrap=True)
    if found.comparison is not None and found.comparison.scores:
        original, scores = dict(found.comparison.original), dict(found.comparison.scores)
        screen.print(f"{scores_told(scores)}; original {scores_told(original)}", highlight=False, soft_wrap=True)
    if found.comparison is not None and found.comparison.unlike:
        note(f"zeros would be nearer to the weights of {task} than the file's are: was it made from these?")
    print_json({"page": str(out)} | found.to_dict(), as_json)


@app.command(epilog="Example: factorpack verify model.fpk")
@command
def verify(file: FileArgument, as_json: Json = False) -> None:
    """Check every length and checksum of a file and decode all of it."""
    from factorpack.container import File
    from factorpack.factors import FactoredVector, FactoredWeight

    opened = File(file)
    stored = [name for name in opened.shapes if name not in opened.aliases]
    with bars(notes) as progress:
        for done, name in enumerate(stored):
            progress("decoding", done, len(stored))
            tensor = opened.tensor(name)
            if isinstance(tensor, FactoredWeight | FactoredVector):
                tensor.tensor()
    names, size = len(opened.shapes), file.stat().st_size
    screen.print(f"{file}: good, {names} tensors, {size:,} bytes", highlight=False)
    print_json({"ok": True, "tensors": names, "size_bytes": size}, as_json)


@app.command(epilog="Example: factorpack decompress model.fpk --out model.safetensors")
@command
def decompress(
    file: FileArgument,
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="The file to write.")],
    as_json: Json = False,
) -> None:
    """Write all tensors, dense and in their original dtypes, as a safetensors file."""
    from safetensors.torch import save

    from factorpack.container import write
    from factorpack.pipeline import load_state_dict

    # Tied tensors are written under each of their names: safetensors holds no two names for one tensor.
    dense = {name: tensor.clone().contiguous() for name, tensor in load_state_dict(file).items()}
    try:
        data = save(dense)
    except KeyError as error:
        raise UnsupportedError(f"safetensors has no place for {error}: use factorpack.load_state_dict") from error
    write(out, data)
    screen.print(f"{out}: {len(dense)} tensors, {human(out.stat().st_size)}", highlight=False)
    print_json({"file": str(out), "tensors": len(dense), "size_bytes": out.stat().st_size}, as_json)


@exports.command("onnx", epilog="Example: factorpack export onnx task.py model.fpk --out model.onnx")
@command
def export_onnx(
    task: TaskArgument,
    file: FileArgument,
    out: Annotated[Path, typer.Option(metavar="FILE.onnx", help="The file to write.")],
    mode: Annotated[
        str,
        typer.Option(
            help="fold: the runtime recombines the weights once, when it loads the file; dense speed. stream: at every "
            "run, each weight when it is needed; little memory."
        ),
    ] = "fold",
    as_json: Json = False,
) -> None:
    """Write a compressed network as an ONNX file of standard operators that stays small.

    The graph takes what the first batch of calibration() holds, with as many samples as you like.
    """
    from factorpack.export.onnx import export_onnx as export
    from factorpack.task import load_task

    check_folder(out, "--out")
    loaded = load_task(task)
    batches = loaded.calibration()
    if not batches:
        raise TaskError(f"{loaded.name}: calibration() holds no batch to call the network with")
    with waiting("exporting, and comparing with onnxruntime"):
        report = export(file, loaded.model(), batches[0], out, mode)
    for name in report.dense:
        note(f"the graph has no tensor {name}: what torch made of it there is stored as plain numbers")
    if report.largest_difference is None:
        note("onnxruntime is not installed: the graph was checked, but not run")
    else:
        screen.print(f"outputs in onnxruntime are torch's to {report.largest_difference:.1g}", highlight=False)
    size, packed = report.size_bytes, file.stat().st_size
    screen.print(f"{out}: {size:,} bytes, {size / packed:.1f} times {file}", highlight=False, soft_wrap=True)
    print_json({"file": str(out), "mode": mode} | asdict(report), as_json)
