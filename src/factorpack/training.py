"""Composition: a compressed file is trained, from lessons to the best file under the size.

States of the network are compared on a slice of the lessons that is held out, each as the file that it would be.
"""

import copy
import csv
import io
import json
import math
import pickle
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from factorpack.container import Contents, File, make_folder, read, write
from factorpack.devices import accelerator_for, of_main
from factorpack.errors import BudgetError, TaskError, UnsupportedError
from factorpack.nn.averages import Averages
from factorpack.nn.control import RateController
from factorpack.nn.distillation import temperature_for
from factorpack.nn.freezing import Freezing, limit_at
from factorpack.nn.lessons import Course, batches_in, exchanged, hold_out, to_measure_on
from factorpack.nn.loading import identity, place_dense
from factorpack.nn.norms import Norms
from factorpack.nn.prefix import copy_of
from factorpack.nn.statistics import call_model
from factorpack.nn.trainable import TrainableModel
from factorpack.nn.training import LONG, SECOND, Clipper, Learner, Objective, highest_rate, optimiser, pace_at
from factorpack.options import Progress
from factorpack.pipeline import load, silent
from factorpack.store import Note, unheard
from factorpack.task import Evaluate, as_scores
from factorpack.trained import at_rest, trainable_of, trimmed, written
from factorpack.training_options import Lessons, TrainingOptions, TrainingReport

SLACK, LAST_SLACK = 0.004, 0.001
"""Training aims at a file that is by this part smaller than the promise: at its highest rate, when sizes sway most, and
at its end."""
TRIMMED = 0.01
"""A file that is larger than the promise by at most this part is judged without its codes nearest to zero. Early in a
training, when few of them are near, that costs much; then it loses against the states before it."""
LOOK, CODES_A_STEP = 10, 1_000_000
"""Training steps from one look at the size to the next; more where codes are many."""
LOOKS_A_FIT, MOVED = 4, 0.002
"""Looks from one fit of the coder's tables to the next, fewer where the size has moved by more than that part of it:
else codes have changed by little, and a fit took a quarter of a small network's training (docs/log.md)."""
FRESH = 5
"""Training steps from one look at the slopes of the codes' bits to the next."""
MOMENTS_COST = 0.1
"""Part of the held-out loss that batch norms with moments of other lessons may add before training."""
JUDGEMENTS = 20
"""So often in a training is the network judged on what is held out."""


def finetune(
    model: nn.Module,
    file: str | Path,
    out: str | Path,
    lessons: Lessons,
    options: TrainingOptions,
    evaluate: Evaluate | None = None,
) -> TrainingReport:
    """Trains what is in `file` and writes the best of it to `out`, of at most the size that was asked for.

    `model` is the original network, which is distilled from and left as it was. States are compared on a slice of
    training() that is held out; `evaluate(model)` only tells the score of the file that was kept, loaded back.
    The folder OUT.training gets a log (log.csv) and, until training is complete, the state to resume from.
    Raises BudgetError where no state fits the size, FormatError and MismatchError as `load`, TaskError for lessons
    that cannot be used, UnsupportedError where accelerate is missing.

    Examples:
        >>> lessons = factorpack.Lessons(training=lambda epoch: [(batch, None) for batch in batches])
        >>> options = factorpack.TrainingOptions(steps=2)  # or minutes=30
        >>> report = factorpack.finetune(build_model(), "model.fpk", "trained.fpk", lessons, options)
        >>> report.steps
        2
    """
    run = Run(model, Path(file), Path(out), lessons, options)
    run.train()
    return run.report(evaluate)


@dataclass
class State:
    """How far a training has come; kept beside latents and optimiser."""

    step: int = 0
    seconds: float = 0.0
    judged: int = 0
    rested: bool = False
    best_step: int = 0
    held_loss_before: float = math.inf
    held_loss: float = math.inf


@dataclass(eq=False)
class Run:
    """One training of one file; `train` it, then `report`."""

    model: nn.Module
    file: Path
    out: Path
    lessons: Lessons
    options: TrainingOptions
    progress: Progress = silent
    note: Note = unheard

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        options, lessons = self.options, self.lessons
        if self.out.resolve() == self.file.resolve():
            raise UnsupportedError(
                f"{self.out} is what is trained, and needed to go on after a stop: give another --out"
            )
        self.accelerator = accelerator_for(options)
        if not self.accelerator.is_main_process:
            self.progress, self.note = silent, unheard
        self.progress("preparing", 0, 1)
        contents, bill = read(self.file)
        self.size = options.size or bill.size_bytes
        held = hold_out(lessons.training)
        objective = Objective(
            lessons.output, lessons.loss, options.distil, options.compare, options.features, options.orthogonality
        )
        compressed = trainable_of(copy_of(self.model), contents)
        learner = Learner(compressed, copy_of(self.model), objective)
        made = optimiser(compressed, 1.0)
        self.factors = [group["lr"] for group in made.param_groups]
        self.learner = learner
        self.wrapped, self.optimiser = self.accelerator.prepare(learner, made)
        self.judge = copy_of(self.model).eval().to(self.accelerator.device)
        self.rest = bill.size_bytes - compressed.coded_bytes()
        self.look = max(LOOK, compressed.codes_count() // CODES_A_STEP)
        self.clipper = Clipper()
        processes = self.accelerator.num_processes
        self.course = Course(lessons.training, held, processes=processes, process=self.accelerator.process_index)
        self.steps = options.steps
        if options.epochs is not None:
            self.steps = math.ceil(options.epochs * batches_in(lessons.training) / processes)
        self.layout = self._layout()
        if objective.way == "divergence":
            learner.objective = replace(objective, temperature=self._temperature())
        self.norms = Norms(compressed, partial(self._call_lessons, 1))
        self.averages, self.freezing = Averages(compressed), Freezing(compressed)
        self.state = State()
        self.complete = False
        self.losses: list[float] = []
        # Whoever goes on from a kept state fits at once: it was kept after a fit.
        self._unfitted, self._fitted = LOOKS_A_FIT, max(compressed.coded_bytes(), 1.0)
        self._judging = 0.0
        self._now = self._reserve = 0.0
        self.controller = RateController(compressed.codes_count(), self._goal())
        folder = self.out.with_name(self.out.name + ".training")
        self._log, self._kept = folder / "log.csv", folder / "state.pt"
        self._logged = ""
        self._key = self._key_of_run()
        self.progress("preparing", 1, 1)

    # --- what is trained ------------------------------------------------------------------------------------------

    @property
    def compressed(self) -> TrainableModel:
        return self.learner.model

    def _layout(self) -> torch.memory_format:
        """Channels last where the network takes it, which convolutions are faster in."""
        batch = self.course.held.lessons[0][0]
        try:
            with torch.no_grad():
                call_model(self.judge, self._moved(batch, torch.channels_last))
        except RuntimeError:
            return torch.contiguous_format
        return torch.channels_last

    def _moved(self, part: Any, layout: torch.memory_format) -> Any:
        if isinstance(part, Mapping):
            return {name: self._moved(value, layout) for name, value in part.items()}
        if isinstance(part, tuple | list):
            return tuple(self._moved(value, layout) for value in part)
        if not isinstance(part, Tensor):
            return part
        moved = part.to(self.accelerator.device, non_blocking=True)
        return moved.contiguous(memory_format=layout) if part.ndim == 4 and part.is_floating_point() else moved

    @torch.no_grad()
    def _temperature(self) -> float:
        """The temperature at which logits are compared, by what the original says of what is held out."""
        distilled = [batch for batch, targets in self.course.held.lessons if self.learner.objective.share(targets)]
        batches = (self._moved(batch, self.layout) for batch in distilled)
        found = temperature_for(call_model(self.learner.original, batch) for batch in batches)
        # All processes do what the main one does.
        temperature: float = of_main(self.accelerator, torch.tensor(found, device=self.accelerator.device)).item()
        if temperature > 1:
            self.note(f"the original is sure of its lessons: logits are compared at a temperature of {temperature:.2g}")
        return temperature

    def _call_lessons(self, sample: int) -> None:
        """Calls the network in training on a sample of lessons that moments are measured on."""
        for batch in to_measure_on(self.lessons.training, self.course.held, sample):
            call_model(self.compressed, self._moved(batch, self.layout))

    def _settle(self, sample: int = 1) -> None:
        """Takes batch norms to the moments of such a sample."""
        self.norms.settle(partial(self._call_lessons, sample), partial(of_main, self.accelerator))

    def _settle_usual(self) -> None:
        """Takes batch norms to the moments of the network that it usually is, its own w and b and the usual ones."""
        if not self.norms.placed:
            return
        moments = self.norms.state()
        with self.averages.in_place():
            self._settle()
            self.averages.keep()
        settled = self.norms.state()
        self.norms.take_up(moments)
        self.norms.move(settled)

    def _try_norms(self) -> None:
        """Leaves batch norms as the file has them where moments of other lessons alone cost more than `MOMENTS_COST`.

        A network that has lost little learns more without depending on a sample. One that has to become smaller first
        will lose more.
        """
        if not self.norms.placed:
            return
        moments, latents = self.norms.state(), copy.deepcopy(self.compressed.latents.state_dict())
        self._settle(sample=2)
        loss = self._held_loss(at_rest(self.compressed))
        self.compressed.latents.load_state_dict(latents)
        self.norms.take_up(moments)
        costs = torch.tensor(loss > (1 + MOMENTS_COST) * self.state.held_loss_before, device=self.accelerator.device)
        if of_main(self.accelerator, costs):
            self.norms.leave()

    # --- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains until the end that the options give; what is stopped before has left its best file in `out`."""
        self._resume_or_begin()
        state = self.state
        while not self._over():
            if self.norms.placed and self._twice and self._done() >= SECOND:
                self._rest()
            if state.step % self.look == 0:
                if state.step:
                    # At first the prices are those of the file.
                    due = self._done() * JUDGEMENTS >= state.judged + 1
                    self._look(due)
                    if due and self._fits():
                        self._judge()
                        self._keep()
                self.controller.goal = self._goal()
                self.controller.seen(self.compressed.coded_bytes(), self._pace)
            self._step()
        self._look(True)
        self._judge()
        self.complete = True
        if not self.accelerator.is_main_process:
            return
        if not math.isfinite(state.held_loss):
            raise BudgetError(
                f"{self.size:,} bytes were not reached in {state.step} steps, {self._expected():,} at the end: train "
                f"for longer, start from a smaller file (factorpack compress --size {self.size}), or ask for more"
            )
        self._kept.unlink(missing_ok=True)

    def _take_time(self) -> None:
        """Reads the clock; all processes go by that of the main one, so that they stop together."""
        told = torch.tensor([self._elapsed(), self._judging], dtype=torch.float32, device=self.accelerator.device)
        self._now, self._reserve = of_main(self.accelerator, told).tolist()

    def _done(self) -> float:
        """The part of the training that is over."""
        if self.steps is not None:
            return self.state.step / self.steps if self.steps else 1.0
        assert self.options.minutes is not None
        # The last judgement has to fit in.
        limit = 60 * self.options.minutes - 1.5 * self._reserve
        return self._now / limit if limit > 0 else 1.0

    def _over(self) -> bool:
        if self.steps is None:
            self._take_time()
        shown = self._now if self.steps is None else self.state.step
        total = 60 * self.options.minutes if self.options.minutes is not None else self.steps or 0
        if self.state.step % 5 == 0:
            self.progress("training", int(min(shown, total)), int(total))
        return self._done() >= 1

    def _step(self) -> None:
        rate = self._rate()
        for group, factor in zip(self.optimiser.param_groups, self.factors, strict=True):
            group["lr"] = factor * rate
        batch, targets = next(self.course)
        if self.learner.objective.share(targets) == 1:
            batch = exchanged(batch, self.state.step * self.course.processes + self.course.process)
        self.optimiser.zero_grad()
        loss = self.wrapped(self._moved(batch, self.layout), self._moved(targets, torch.contiguous_format))
        if not bool(torch.isfinite(loss)):
            raise TaskError(f"the loss of a batch of epoch {self.course.epoch} is not finite: is its data?")
        self.accelerator.backward(loss)
        parameters = list(self.compressed.parameters())
        if self.clipper(lambda limit: self.accelerator.clip_grad_norm_(parameters, limit)):
            if self.accelerator.num_processes > 1:
                loss = self.accelerator.reduce(loss.detach(), "mean")
            self.controller.heard(loss.item())
            # Prices that have just been taken are of other codes, the usual ones.
            fresh = self.state.step % FRESH == 0 or self.state.step % self.look == 0
            self.compressed.price(self.controller.rate, fresh)
            self.freezing.still()
            self.losses.append(loss.item())
            self.optimiser.step()
        elif self.accelerator.scaler is not None:
            # In fp16: the step is skipped, and the scale of the loss lowered.
            self.optimiser.step()
        self.state.step += 1
        if self.state.step % FRESH == 0:
            resting = self.compressed.resting()
            self.averages.take(resting, self.state.step, FRESH)
            self.freezing.take(resting, FRESH)
            done = self._done() / (SECOND if self._twice else 1.0)
            self.freezing.freeze(limit_at(done, self._steps_in_all), self.averages.state())

    def _look(self, fit: bool) -> None:
        """Takes the size of the file as it would be now; where that is due, or to `fit`, with new tables and prices."""
        self._unfitted += 1
        with self.averages.in_place():
            self.compressed.recount()
            moved = abs(self.compressed.coded_bytes() / self._fitted - 1)
            if fit or self._unfitted >= LOOKS_A_FIT or moved > MOVED:
                self.compressed.reprice()
                self._unfitted, self._fitted = 0, max(self.compressed.coded_bytes(), 1.0)

    def _rest(self) -> None:
        """Takes the network to the file that it would be now, where the second descent begins."""
        self.averages.become()
        self._settle()
        self.norms.leave()
        for latent in self.compressed.trained().values():
            latent.rest()
        self.averages = Averages(self.compressed)
        self.freezing.begin(self.compressed.resting())
        self.optimiser.state.clear()
        self.state.rested = True

    def _rate(self) -> float:
        """The learning rate of codes now."""
        highest = self.options.learning_rate
        if highest is None:
            highest = highest_rate(self._steps_in_all, norms_by_batches=bool(self.norms.placed) or self.state.rested)
        return highest * self._pace

    @property
    def _pace(self) -> float:
        """The part of the highest rates that they are at now."""
        return pace_at(self._done(), self._twice)

    @property
    def _steps_in_all(self) -> float:
        """In a training of minutes, as many as there will be at the pace so far."""
        return self.steps if self.steps is not None else self.state.step / max(self._done(), 1e-9)

    @property
    def _twice(self) -> bool:
        """Whether rates fall twice."""
        return self.state.rested or (bool(self.norms.placed) and self._steps_in_all >= LONG)

    def _goal(self) -> float:
        """Bytes that the codes are to take now."""
        slack = LAST_SLACK + (SLACK - LAST_SLACK) * self._pace
        return max(self.size * (1 - slack) - self.rest, 1.0)

    def _expected(self) -> int:
        """Bytes of the file as it would be now."""
        return math.ceil(self.compressed.coded_bytes() + self.rest)

    def _fits(self) -> bool:
        """Whether a file would be small enough; until late in the training a judgement can wait for that."""
        return self._expected() <= self.size or self._done() * JUDGEMENTS >= self.state.judged + 2

    # --- what is kept ---------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """The loss of the file as it would be now, on what is held out; the best is written to `out`."""
        state, began = self.state, time.perf_counter()
        state.judged = math.floor(self._done() * JUDGEMENTS)
        if state.step:
            self._settle_usual()
        with self.averages.in_place():
            data, contents = self._file()
        if self.accelerator.is_main_process:
            loss = self._held_loss(contents) if len(data) <= self.size else math.inf
            if loss < state.held_loss:
                state.held_loss, state.best_step = loss, state.step
                write(self.out, data)
            self._told(loss, len(data))
            self._judging = time.perf_counter() - began
        self.accelerator.wait_for_everyone()

    def _file(self) -> tuple[bytes, Contents]:
        """The file of the network, and what is in it; one that is hardly too large is trimmed."""
        data, contents = written(self.compressed)
        # Small tensors and bases take other bytes than before, by little.
        self.rest = len(data) - self.compressed.coded_bytes()
        if self.size < len(data) <= self.size * (1 + TRIMMED) and self.accelerator.is_main_process:
            with suppress(BudgetError):
                return trimmed(self.compressed, self.size)
        return data, contents

    @torch.no_grad()
    def _held_loss(self, contents: Contents) -> float:
        """The mean loss over the held-out batches of the network that is in the file."""
        place_dense(self.judge, contents.tensors, contents.dtypes, contents.aliases)
        total = 0.0
        for batch, targets in self.course.held.lessons:
            moved = self._moved(batch, self.layout)
            total += self.learner.loss(self.judge, moved, self._moved(targets, torch.contiguous_format)).item()
        return total / len(self.course.held.lessons)

    def report(self, evaluate: Evaluate | None) -> TrainingReport:
        """On the file that was kept, read back from disk; `evaluate` scores it."""
        seconds = self._elapsed()
        bill = File(self.out).bill()
        began = time.perf_counter()
        scores = as_scores(evaluate(load(self.out, copy_of(self.model))), "finetune") if evaluate else {}
        evaluation = time.perf_counter() - began if evaluate else 0.0
        state, dense = self.state, sum(tensor.numel() * tensor.itemsize for tensor in _distinct(self.model))
        return TrainingReport(
            bill.size_bytes, dense / bill.size_bytes, state.step, self.course.epoch, state.best_step,
            state.held_loss_before, state.held_loss, seconds, evaluation, self.complete, scores,
        )  # fmt: skip

    def _resume_or_begin(self) -> None:
        """Takes up the state that was kept, or judges the file that was given, which is the best one so far."""
        make_folder(self._log.parent)
        if self.options.resume and self._kept.exists():
            self._take_up()
            return
        if self.options.resume:
            self.note(f"there is nothing to resume in {self._kept.parent}: training starts from the file")
        if self.accelerator.is_main_process:
            self._log.unlink(missing_ok=True)
            self._kept.unlink(missing_ok=True)
        self._judge()
        self.state.held_loss_before = self.state.held_loss
        self._try_norms()

    def _key_of_run(self) -> str:
        """Of what a state belongs to."""
        options = {name: value for name, value in asdict(self.options).items() if name not in ("resume", "device")}
        compared = [self.learner.objective.way, self.learner.objective.temperature]
        told = json.dumps([options, compared, self.accelerator.num_processes], sort_keys=True)
        return sha256(told.encode() + self.file.read_bytes()).hexdigest()

    def _keep(self) -> None:
        """Keeps all that the rest of the training depends on, complete or not at all."""
        if not self.accelerator.is_main_process:
            return
        kept = {
            "key": self._key, "state": asdict(self.state) | {"seconds": self._elapsed()},
            "place": [self.course.epoch, self.course.place], "controller": asdict(self.controller),
            "rest": self.rest, "usual": self.clipper.usual, "latents": self.compressed.latents.state_dict(),
            "optimiser": self.optimiser.state_dict(), "norms": self.norms.state(), "log": self._logged,
            "averages": self.averages.state(), "freezing": self.freezing.state(),
        }  # fmt: skip
        data = io.BytesIO()
        torch.save(kept, data)
        write(self._kept, data.getvalue())

    def _take_up(self) -> None:
        try:
            kept = torch.load(self._kept, map_location=self.accelerator.device, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise UnsupportedError(f"{self._kept} cannot be read ({error}): start again without --resume") from error
        if kept.get("key") != self._key or "freezing" not in kept:
            raise UnsupportedError(
                f"{self._kept} is of another file, of other options or of another version: give those that it was "
                f"begun with, or start again without --resume"
            )
        self.compressed.latents.load_state_dict(kept["latents"])
        self.optimiser.load_state_dict(kept["optimiser"])
        self.norms.take_up(kept["norms"])
        self.averages.take_up(kept["averages"])
        self.freezing.take_up(kept["freezing"])
        self.state = State(**kept["state"])
        self.course.epoch, self.course.place = kept["place"]
        self.controller = RateController(**kept["controller"])
        self.clipper, self.rest = Clipper(kept["usual"]), kept["rest"]
        # Without the lines that came after the state: they come again.
        self._logged = kept["log"]
        self.note(f"going on from step {self.state.step}")

    def _elapsed(self) -> float:
        """Seconds since the training began, all runs of it together."""
        return self.state.seconds + time.perf_counter() - self._began

    def _told(self, loss: float, size: int) -> None:
        """A line of the log, and one for whoever watches."""
        state, losses = self.state, self.losses
        mean = sum(losses) / len(losses) if losses else math.nan
        row = {
            "step": state.step, "epoch": self.course.epoch, "seconds": round(self._elapsed(), 1),
            "loss": mean, "held_loss": loss, "size_bytes": size, "rate": self.controller.rate,
            "learning_rate": self._rate(), "frozen": self.freezing.part(),
        }  # fmt: skip
        line = io.StringIO()
        writer = csv.DictWriter(line, list(row))
        if not self._logged:
            writer.writeheader()
        writer.writerow(row)
        # Whole, since an appended line can be torn, by a kill or a full disk.
        self._logged += line.getvalue()
        write(self._log, self._logged.encode())
        self.losses.clear()
        held = f"held-out loss {loss:.4f}" if math.isfinite(loss) else f"more than {self.size:,} bytes"
        best = ", the best so far" if state.best_step == state.step and math.isfinite(loss) else ""
        self.note(f"step {state.step}, epoch {row['epoch']}: {held}, {size:,} bytes{best}")


def _distinct(model: nn.Module) -> list[Tensor]:
    """The tensors of a network's state, each tied one once."""
    return list({identity(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values())
