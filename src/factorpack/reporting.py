"""Composition: a compressed file and, where it is at hand, what it was made from, to the numbers of a report."""

import platform
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from factorpack import __version__
from factorpack.cache import fingerprint
from factorpack.container import Bill, Contents, read
from factorpack.container.layout import VERSION
from factorpack.errors import MismatchError, UnsupportedError
from factorpack.evaluate.losses import Probe, relative_error
from factorpack.evaluate.report import Comparison, FileReport, Provenance, describe, with_losses
from factorpack.factors import FactoredWeight
from factorpack.nn.loading import place_dense, state_dict
from factorpack.nn.prefix import copy_of
from factorpack.nn.stored import StoredTensors, holds_weights_alone, stored_tensors
from factorpack.options import Options, Progress
from factorpack.pipeline import Source, silent
from factorpack.plan import ModelPlan
from factorpack.task import Evaluate, as_scores, checked_output, load_task


@dataclass(frozen=True, eq=False)
class Original:
    """What a file was made from, called `name`, and how it is scored; `spec` is the task on a command line."""

    name: str
    source: Source
    evaluate: Evaluate | None = None
    spec: str = ""


@dataclass(frozen=True, eq=False)
class Subject:
    """What a report is on: a file, its original and the plan that `compress` saved, as far as they are at hand.

    `plan_path` and `out` are where plan and page are, for the commands that make them again.
    """

    path: Path
    original: Original | None = None
    plan: ModelPlan | None = None
    plan_path: Path | None = None
    out: Path | None = None


def original_of(spec: str) -> Original:
    """The original that a command line names: a task, or bare weights. Raises TaskError as `load_task`."""
    if holds_weights_alone(spec):
        return Original(Path(spec).name, Source(stored_tensors(Path(spec))), None, spec)
    task = load_task(spec)
    return Original(task.name, Source.of(task), task.evaluate if task.has("evaluate") else None, spec)


def report(
    path: str | Path,
    model: nn.Module | None = None,
    calibration: Iterable[object] | None = None,
    evaluate: Evaluate | None = None,
    output: str = "logits",
) -> FileReport:
    """The numbers on a compressed file and, beside the original `model`, on what it lost; `to_html` makes a page of it.

    `calibration`, `evaluate` and `output` are as for `compress`: with calibration there are losses by layer, with
    `evaluate` scores of both. The model is left as it was. Raises FormatError for a damaged file, MismatchError for a
    file of another model.

    Examples:
        >>> page = factorpack.report("model.fpk", build_model(), batches).to_html()
        >>> page.lstrip().startswith("<!DOCTYPE html>")
        True
    """
    checked_output(output, "report")
    if model is None:
        if calibration is not None or evaluate is not None:
            raise UnsupportedError("calibration and evaluate need the original network: hand over model too")
        return measured(Subject(Path(path)))
    batches = None if calibration is None else list(calibration)
    return measured(Subject(Path(path), Original(type(model).__name__, Source(model, batches, output), evaluate)))


def measured(subject: Subject, progress: Progress = silent) -> FileReport:
    """The numbers on a file. Raises MismatchError where original or plan are not the file's."""
    contents, bill = read(subject.path)
    _check_plan(subject, bill)
    found = describe(subject.path.name, contents, bill, _provenance(subject, bill))
    if subject.original is None:
        return found
    if isinstance(subject.original.source.model, nn.Module):
        return _against_network(found, contents, subject.original, _options(subject.plan), progress)
    return _against_tensors(found, contents, subject.original, progress)


def _check_plan(subject: Subject, bill: Bill) -> None:
    plan = subject.plan
    if plan is None:
        return
    forms = {weight.name: weight.form for weight in bill.weights}
    if plan.size_bytes != bill.size_bytes or {name: layer.form for name, layer in plan.layers.items()} != forms:
        raise MismatchError(
            f"the plan is of another file: it tells of {len(plan.layers)} weights in {plan.size_bytes:,} bytes, "
            f"{subject.path} holds {len(forms)} in {bill.size_bytes:,}; give the one that was saved with the file"
        )


def _options(plan: ModelPlan | None) -> Options:
    return Options() if plan is None else Options(seed=plan.seed)


def _provenance(subject: Subject, bill: Bill) -> Provenance:
    plan = subject.plan
    batches = None if subject.original is None else subject.original.source.batches
    versions = {
        "factorpack": __version__, "Python": platform.python_version(), "torch": str(torch.__version__),
        "NumPy": np.__version__, "machine": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip
    known = None
    if batches is not None:
        # Batches of kinds that no hash is known for can be learned from all the same.
        with suppress(UnsupportedError):
            known = fingerprint(batches)
    found = Provenance(
        sha256(subject.path.read_bytes()).hexdigest(), VERSION, versions, _commands(subject, bill.size_bytes),
        calibration_batches=None if batches is None else len(batches), calibration_sha256=known,
    )  # fmt: skip
    if plan is None:
        return found
    return replace(found, seed=plan.seed, rate=plan.rate, behind_prefix=plan.behind_prefix)


def _commands(subject: Subject, size: int) -> dict[str, str]:
    """What each does, and the command."""
    spec = subject.original.spec if subject.original else ""
    file, found = str(subject.path), {}
    if spec and subject.plan_path:
        what = "These bytes again, on the same machine, with the --exclude and --keep-batch-norms that were given"
        found[what] = ["compress", spec, "--plan", str(subject.plan_path), "--out", file]
    elif spec:
        found["A file of this size; the options that this one was made with are in no file but a saved plan"] = [
            "compress", spec, "--size", str(size), "--out", file
        ]  # fmt: skip
    if subject.out:
        given = [
            *(["--task", spec] if spec else []),
            *(["--plan", str(subject.plan_path)] if subject.plan_path else []),
        ]
        found["This page"] = ["report", file, *given, "--out", str(subject.out)]
    return {what: shlex.join(["factorpack", *parts]) for what, parts in found.items()}


def _against_tensors(found: FileReport, contents: Contents, original: Original, progress: Progress) -> FileReport:
    """Bare weights tell of relative errors alone."""
    tensors = original.source.model
    assert isinstance(tensors, StoredTensors)
    for layer in found.layers:
        shape = tensors.shapes.get(layer.name)
        if shape != layer.shape:
            raise MismatchError(
                f"the file is for other weights: {layer.name!r} is {layer.shape} in the file and {shape or 'missing'} "
                f"in {original.name}; give the weights that it was made from"
            )
    errors = _errors(found, contents, tensors, progress)
    return replace(with_losses(found, errors, {}, {}, ()), comparison=_comparison(errors, original))


def _against_network(
    found: FileReport, contents: Contents, original: Original, options: Options, progress: Progress
) -> FileReport:
    source = original.source
    assert isinstance(source.model, nn.Module)
    # First of all: a file of another network is refused before anything takes time.
    model = copy_of(source.model).eval()
    compressed = place_dense(copy_of(model), contents.tensors, contents.dtypes, contents.aliases)
    errors = _errors(found, contents, source.model.state_dict(), progress)
    comparison = _scored(_comparison(errors, original), original, model, compressed, progress)
    if source.batches is None:
        return replace(with_losses(found, errors, {}, {}, ()), comparison=comparison)
    state = source.state(options, progress)
    predicted = {}
    for layer in found.layers:
        weight = contents.tensors[layer.name]
        # A buffer of several axes may be factored as a bare tensor, and is no weight of the network.
        if layer.name in state.layers and isinstance(weight, FactoredWeight):
            predicted[layer.name] = state.layers[layer.name].loss(weight)
    probe = Probe(model, source.batches, source.output, len(found.layers))
    alone = {}
    for done, layer in enumerate(found.layers):
        progress("one weight at a time", done, len(found.layers))
        dense = state_dict({layer.name: contents.tensors[layer.name]}, contents.dtypes, {})[layer.name]
        alone[layer.name] = probe.loss(dict.fromkeys((layer.name, *layer.aliases), dense))
    progress("one weight at a time", len(found.layers), len(found.layers))
    rest = {name: contents.tensors[name] for name in (other.name for other in found.others) if name in contents.tensors}
    comparison = replace(
        comparison,
        predictions=probe.predictions,
        batches=len(probe.batches),
        small_loss=probe.loss(state_dict(rest, contents.dtypes, {})),
        whole_loss=probe.loss(compressed.state_dict()),
    )
    return replace(with_losses(found, errors, predicted, alone, state.unseen), comparison=comparison)


def _errors(
    found: FileReport, contents: Contents, tensors: Mapping[str, Tensor], progress: Progress
) -> dict[str, float]:
    """Relative squared errors by layer."""
    errors = {}
    for done, layer in enumerate(found.layers):
        progress("errors of the weights", done, len(found.layers))
        dense = state_dict({layer.name: contents.tensors[layer.name]}, contents.dtypes, {})[layer.name]
        errors[layer.name] = relative_error(tensors[layer.name], dense)
    progress("errors of the weights", len(found.layers), len(found.layers))
    return errors


def _comparison(errors: Mapping[str, float], original: Original) -> Comparison:
    # Zeros would have an error of 1: in the middle weights of the same network are far below.
    unlike = bool(errors) and float(np.median(list(errors.values()))) >= 1
    return Comparison(original.name, original.source.output, unlike=unlike)


def _scored(
    comparison: Comparison, original: Original, model: nn.Module, compressed: nn.Module, progress: Progress
) -> Comparison:
    evaluate = original.evaluate
    if evaluate is None:
        return comparison
    scores = []
    for done, network in enumerate((model, compressed)):
        progress("scores", done, 2)
        # A copy: an evaluation may change what it is given.
        scores.append(as_scores(evaluate(copy_of(network)), original.name))
    progress("scores", 2, 2)
    return replace(comparison, original=scores[0], scores=scores[1])
