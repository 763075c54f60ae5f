"""Training of a compressed file: what is promised of the file that it leaves, whatever happens meanwhile."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import Network, data, evaluate
from test_cli import answer, assert_one_line, run, write
from torch.nn import functional as F

import factorpack
from factorpack.errors import BudgetError, TaskError, UnsupportedError
from factorpack.options import Options
from factorpack.task import Task, load_task
from factorpack.training import Run, finetune
from factorpack.training_options import Lessons, TrainingOptions

COMMAND = "from factorpack.cli import main; main()"
SOURCE = str(Path(factorpack.__file__).parents[1])
ENVIRONMENT = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def task(digits_task) -> Task:
    return load_task(str(digits_task.path))


@pytest.fixture(scope="module")
def lessons(task: Task) -> Lessons:
    return Lessons(task.training)


@pytest.fixture(scope="module")
def file(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network at 1,500 bytes, where it has lost a good deal."""
    path = tmp_path_factory.mktemp("files") / "small.fpk"
    factorpack.compress(task.model(), 1500, task.calibration()).save(path)
    return path


def trained(task: Task, file: Path, out: Path, **options: object) -> factorpack.TrainingReport:
    chosen = TrainingOptions(**{"learning_rate": 0.01} | options)
    return finetune(task.model(), file, out, Lessons(task.training), chosen, evaluate)


def logged(out: Path) -> list[dict[str, str]]:
    with (out.with_name(f"{out.name}.training") / "log.csv").open() as log:
        return list(csv.DictReader(log))


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["auto", "sparse_pca", "svd", "vq"])
def test_no_steps_leave_every_weight_as_it_was(task: Task, tmp_path: Path, form: str) -> None:
    packed = factorpack.compress(task.model(), 6000, task.calibration(), options=Options(form))
    packed.save(tmp_path / "before.fpk")
    report = trained(task, tmp_path / "before.fpk", tmp_path / "after.fpk", steps=0)
    before, after = (factorpack.load_state_dict(tmp_path / f"{name}.fpk") for name in ("before", "after"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert report.size_bytes == len(packed.data)
    assert report.held_loss == report.held_loss_before


def test_training_wins_back_what_rounding_lost_within_the_size(task: Task, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "trained.fpk"
    report = trained(task, file, out, steps=1000)
    assert report.size_bytes == out.stat().st_size <= file.stat().st_size
    assert report.held_loss < 0.8 * report.held_loss_before
    before = evaluate(factorpack.load(file, Network()).eval())
    assert report.scores == evaluate(factorpack.load(out, Network()).eval())
    assert report.scores["minus_nats"] > before["minus_nats"]
    assert (report.steps, report.complete) == (1000, True)


def test_bits_move_until_another_size_is_met(task: Task, file: Path, tmp_path: Path) -> None:
    out, size = tmp_path / "smaller.fpk", 1200
    report = trained(task, file, out, steps=400, size=size)
    assert 0.97 * size < out.stat().st_size <= size
    assert math.isinf(report.held_loss_before)
    codes = [
        np.count_nonzero(weight.codes.integers)
        for path in (file, out)
        for weight in factorpack.trainable(Network(), path).factored().values()
        if hasattr(weight, "codes")
    ]
    half = len(codes) // 2
    assert sum(codes[half:]) < sum(codes[:half])


@pytest.mark.parametrize(("cost", "by_batch"), [(0.1, 2), (-1.0, 0)])
def test_norms_stay_as_in_the_file_where_moments_cost_more(
    task: Task, file: Path, tmp_path: Path, monkeypatch, cost: float, by_batch: int
) -> None:
    monkeypatch.setattr("factorpack.training.MOMENTS_COST", cost)
    run = Run(task.model(), file, tmp_path / "out.fpk", Lessons(task.training), TrainingOptions(steps=0))
    run.train()
    # The last norm has too few values a channel in a batch.
    assert len(run.norms.placed) == by_batch
    for name, latent in factorpack.trainable(Network(), file).trained().items():
        for mine, theirs in zip(run.compressed.trained()[name].parameters(), latent.parameters(), strict=True):
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("long", [100, 101])
def test_the_last_tenth_of_a_long_training_has_norms_as_in_the_file_and_begins_at_rest(
    task: Task, file: Path, tmp_path: Path, monkeypatch, long: int
) -> None:
    monkeypatch.setattr("factorpack.training.LONG", long)

    class Watched(Run):
        def _step(self) -> None:
            weight = self.compressed.trained()["convolutions.0.weight"]
            steps = (weight.codes / torch.exp2((64 * weight.octaves).round() / 64)).detach()
            seen.append((len(self.norms.placed), self._rate(), float((steps - steps.round()).abs().max())))
            super()._step()

    seen: list[tuple[int, float, float]] = []
    options = TrainingOptions(steps=100, learning_rate=0.02)
    Watched(task.model(), file, tmp_path / "out.fpk", Lessons(task.training), options).train()
    placed, rates, off = zip(*seen, strict=True)
    if long > 100:
        assert placed == (2,) * 100
        return
    assert placed == (2,) * 90 + (0,) * 10
    assert rates[89] < 0.001 < 0.0075 < max(rates[90:]) <= 0.008
    assert off[89] > 0.1
    assert off[90] < 1e-4


@pytest.mark.parametrize("compare", ["auto", "squares"])
def test_a_sure_original_is_compared_at_a_higher_temperature(
    task: Task, file: Path, tmp_path: Path, compare: str
) -> None:
    told: list[str] = []
    options = TrainingOptions(steps=1, compare=compare)
    found = Run(task.model(), file, tmp_path / "out.fpk", Lessons(task.training), options, note=told.append)
    with torch.no_grad():
        logits = torch.cat([task.model()(batch) for batch, _ in found.course.held.lessons])
    temperature = found.learner.objective.temperature
    assert any("temperature" in line for line in told) == (compare == "auto")
    if compare == "squares":
        assert temperature == 1
        return
    assert logits.softmax(-1).amax(-1).mean() > 0.9
    assert (logits / temperature).softmax(-1).amax(-1).mean() == pytest.approx(0.8, abs=0.04)


def test_zeros_wake_up_and_codes_change(task: Task, file: Path, tmp_path: Path) -> None:
    trained(task, file, tmp_path / "trained.fpk", steps=300)
    before, after = (
        factorpack.trainable(Network(), path).factored()["convolutions.1.weight"].codes.integers
        for path in (file, tmp_path / "trained.fpk")
    )
    assert ((before == 0) & (after != 0)).any()
    assert ((before != 0) & (after == 0)).any()


def test_the_best_state_is_kept_and_not_the_last(task: Task, file: Path, tmp_path: Path) -> None:
    report = trained(task, file, tmp_path / "worse.fpk", steps=100, learning_rate=3.0)
    assert report.best_step == 0
    assert (tmp_path / "worse.fpk").read_bytes() == file.read_bytes()


def test_a_size_that_is_out_of_reach_is_an_error(task: Task, file: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="train for longer"):
        trained(task, file, tmp_path / "tiny.fpk", steps=2, size=500)
    assert not (tmp_path / "tiny.fpk").exists()


@pytest.mark.parametrize("shortest", [100, 101])
def test_the_log_tells_how_it_went(task: Task, file: Path, tmp_path: Path, monkeypatch, shortest: int) -> None:
    monkeypatch.setattr("factorpack.nn.freezing.SHORTEST", shortest)
    report = trained(task, file, tmp_path / "trained.fpk", steps=100, learning_rate=0.03)
    rows = logged(tmp_path / "trained.fpk")
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 100)
    assert 5 <= len(steps) <= 11
    assert min(float(row["held_loss"]) for row in rows) == report.held_loss
    assert all(float(row["rate"]) > 0 for row in rows[1:])
    frozen = [float(row["frozen"]) for row in rows]
    assert frozen == sorted(frozen)
    assert frozen[0] == 0
    assert (0 < frozen[-1] < 0.5) == (shortest == 100)
    assert sorted(path.name for path in (tmp_path / "trained.fpk.training").iterdir()) == ["log.csv"]


# --- what is minimised ----------------------------------------------------------------------------------------------


def with_classes(task: Task):
    images, classes = data()
    known = {image.numpy().tobytes(): int(target) for image, target in zip(images, classes, strict=True)}

    def training(epoch: int):
        for batch, _ in task.training(epoch):
            yield batch, torch.tensor([known[image.numpy().tobytes()] for image in batch])

    return training


def test_a_loss_of_the_task_is_minimised_where_there_are_targets(task: Task, file: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, ...]] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        heard.append(tuple(targets.shape))
        # Far from what the original network does.
        return F.cross_entropy(-outputs, targets)

    options = TrainingOptions(steps=200, learning_rate=0.02)
    finetune(task.model(), file, tmp_path / "a.fpk", Lessons(with_classes(task), loss), options)
    assert heard
    rows = logged(tmp_path / "a.fpk")
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[1]["loss"])
    heard.clear()
    finetune(
        task.model(), file, tmp_path / "b.fpk", Lessons(with_classes(task), loss), TrainingOptions(steps=2, distil=1.0)
    )
    assert not heard


def test_a_loss_that_is_not_finite_is_told(task: Task, file: Path, tmp_path: Path) -> None:
    def training(epoch: int):
        return ((batch * math.nan if number else batch, None) for number, (batch, _) in enumerate(task.training(epoch)))

    with pytest.raises(TaskError, match="not finite"):
        finetune(task.model(), file, tmp_path / "nan.fpk", Lessons(training), TrainingOptions(steps=5))


# --- stopped and resumed --------------------------------------------------------------------------------------------


def arguments(digits_task, file: Path, out: Path, *more: str) -> list[str]:
    return ["finetune", str(digits_task.path), str(file), "--out", str(out), "--steps", "400",
            "--learning-rate", "0.01", *more]  # fmt: skip


def test_a_run_that_was_killed_goes_on_to_the_same_file(digits_task, file: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.fpk", tmp_path / "killed.fpk"
    command = [sys.executable, "-c", COMMAND]
    subprocess.run([*command, *arguments(digits_task, file, whole)], env=ENVIRONMENT, check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, *arguments(digits_task, file, killed)],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    state = tmp_path / "killed.fpk.training" / "state.pt"
    log = state.with_name("log.csv")
    deadline = time.monotonic() + 120
    while not (state.exists() and len(log.read_text().splitlines()) > 5) and time.monotonic() < deadline:
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.exists()
    subprocess.run(
        [*command, *arguments(digits_task, file, killed, "--resume")], env=ENVIRONMENT, check=True, capture_output=True
    )
    assert killed.read_bytes() == whole.read_bytes()
    assert not state.exists()


def test_a_run_that_ended_in_its_last_tenth_goes_on_to_the_same_file(
    task: Task, file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("factorpack.training.LONG", 100)

    class Ended(Run):
        def _step(self) -> None:
            if self.state.step == 97:
                raise MemoryError
            super()._step()

    whole, ended = tmp_path / "whole.fpk", tmp_path / "ended.fpk"
    options, lessons = TrainingOptions(steps=100, learning_rate=0.02), Lessons(task.training)
    Run(task.model(), file, whole, lessons, options).train()
    with pytest.raises(MemoryError):
        Ended(task.model(), file, ended, lessons, options).train()
    last = Run(task.model(), file, ended, lessons, replace(options, resume=True))
    last.train()
    assert last.state.rested
    assert int(logged(ended)[-2]["step"]) >= 90
    assert ended.read_bytes() == whole.read_bytes()


class Stopped:
    """Progress that interrupts at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "training" and done >= self.at:
            raise KeyboardInterrupt


def test_ctrl_c_leaves_the_best_file_so_far(digits_task, file: Path, tmp_path: Path, monkeypatch) -> None:
    @contextmanager
    def bars(_console):
        yield Stopped(380)

    monkeypatch.setattr("factorpack.cli.making.bars", bars)
    out = tmp_path / "stopped.fpk"
    found = run(*arguments(digits_task, file, out, "--json"))
    assert found.exit_code == 130, found.stderr
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["complete"] is False
    assert 0 < told["best_step"] <= told["steps"]
    assert out.stat().st_size == told["size_bytes"] <= file.stat().st_size
    assert out.read_bytes() != file.read_bytes()


def test_a_state_of_other_options_is_refused(digits_task, file: Path, tmp_path: Path, monkeypatch) -> None:
    @contextmanager
    def bars(_console):
        yield Stopped(60)

    out = tmp_path / "stopped.fpk"
    with monkeypatch.context() as patched:
        patched.setattr("factorpack.cli.making.bars", bars)
        run(*arguments(digits_task, file, out))
    state = tmp_path / "stopped.fpk.training" / "state.pt"
    assert state.exists()
    assert_one_line(
        run(*arguments(digits_task, file, out, "--resume", "--features", "0.5")), "other options", "--resume"
    )
    state.write_bytes(state.read_bytes()[:1000])
    assert_one_line(run(*arguments(digits_task, file, out, "--resume")), "cannot be read", "without --resume")


# --- processes and time ---------------------------------------------------------------------------------------------


def test_two_processes_train_one_file(digits_task, task: Task, tmp_path: Path) -> None:
    # Of a network that has lost so much that any training helps.
    file = tmp_path / "smaller.fpk"
    factorpack.compress(task.model(), 1400, task.calibration()).save(file)
    out, script = tmp_path / "two.fpk", tmp_path / "train.py"
    script.write_text(COMMAND)
    more = ["finetune", str(digits_task.path), str(file), "--out", str(out), "--steps", "200",
            "--learning-rate", "0.01", "--device", "cpu"]  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), *more, "--json"],
        env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    told = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 1
    assert told[0]["steps"] == 200
    # An epoch has 26 batches, and each step takes two.
    assert told[0]["epoch"] == 400 // 26
    assert told[0]["held_loss"] < told[0]["held_loss_before"]
    assert out.stat().st_size == told[0]["size_bytes"] <= file.stat().st_size


def test_minutes_are_kept(task: Task, file: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    report = trained(task, file, tmp_path / "timed.fpk", minutes=0.1)
    assert report.steps > 0
    assert report.complete
    assert time.monotonic() - began < 60


def test_epochs_are_counted(task: Task, file: Path, tmp_path: Path) -> None:
    assert trained(task, file, tmp_path / "epochs.fpk", epochs=1.5).steps == 39


# --- what a user may do wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "in one way"),
        ({"steps": 5, "minutes": 1}, "in one way"),
        ({"steps": -1}, "not negative"),
        ({"minutes": math.inf}, "not negative"),
        ({"steps": 1, "distil": 2.0}, "share"),
        ({"steps": 1, "learning_rate": -1.0}, "--learning-rate"),
        ({"steps": 1, "compare": "logits"}, "choose auto"),
        ({"steps": 1, "precision": "int8"}, "choose auto"),
        ({"steps": 1, "size": 0}, "no file"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, told: str) -> None:
    with pytest.raises(UnsupportedError, match=told):
        TrainingOptions(**options)


def test_a_file_is_not_trained_into_itself(task: Task, file: Path) -> None:
    with pytest.raises(UnsupportedError, match="is what is trained.*another --out"):
        trained(task, file, file.parent / "." / file.name, steps=1)


def test_without_accelerate_it_says_what_to_install(task: Task, file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UnsupportedError, match=r"pip install factorpack\[finetune\]"):
        trained(task, file, tmp_path / "out.fpk", steps=1)


def test_the_command_line_trains(digits_task, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "trained.fpk"
    told = answer("finetune", digits_task.path, file, "--out", out, "--steps", "100", "--size", "1.6KB")
    assert told.keys() >= {"size_bytes", "ratio", "seconds", "evaluation_seconds", "scores", "held_loss"}
    assert told["size_bytes"] == out.stat().st_size <= 1600
    assert told["ratio"] == pytest.approx(digits_task.size_bytes / told["size_bytes"])
    assert told["scores"] == answer("evaluate", digits_task.path, out)["scores"]


def test_the_command_line_says_what_is_missing(digits_task, file: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out.fpk")
    assert_one_line(run("finetune", digits_task.path, file, *out), "--minutes 30")
    assert_one_line(run("finetune", digits_task.path, tmp_path / "no.fpk", *out, "--steps", 1), "no.fpk")
    assert_one_line(run("finetune", digits_task.path, file, "--out", tmp_path / "no" / "out.fpk", "--steps", 1), "no")
    bare = write(tmp_path, "import torch\ndef model():\n    return torch.nn.Linear(2, 2)\n")
    assert_one_line(run("finetune", bare, file, *out, "--steps", 1), "training()")
