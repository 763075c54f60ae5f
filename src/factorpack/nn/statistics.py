"""What the calibration data say of each weight: the second moments of its inputs, and what its outputs matter.

Letters: m outputs, n inputs of one group, g groups, P positions (samples x places where a weight is applied).

A small change E of a weight, with rows e_o, costs the network about

    ½ Σ_o r_o · e_oᵀ H e_o,    H = E[x xᵀ],    r_o = Σ_j F_oj / tr H

(a Kronecker-factored Gauss-Newton form: Martens & Grosse 2015, Grosse & Martens 2016). H is the mean over the
positions that reach the output at all: padding, whose gradient is zero, is left out. F is the mean squared
gradient of each entry, so r brings the layer's scale, with the correlation between positions in it. The
gradient is that of one random direction at the output a batch: for logits √p∘(v − √p·(√pᵀv)), v ~ N(0, I),
whose covariance is exactly the Fisher information diag(p) − ppᵀ; for embeddings v itself, which gives |J·E|².
Samples are independent and their gradients have mean zero, so the squared gradient of a batch is an unbiased
sum over its samples.
"""

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from factorpack.errors import TaskError
from factorpack.nn.lockstep import in_order
from factorpack.nn.moments import Sums, WeightStatistics, add_sums
from factorpack.nn.uses import Convolution, Dense, Names, bound

ROWS_PER_CALL = 8192
"""At most that many positions of one call enter a moment; beyond, a random subset stands for all."""


Place = tuple[str, int, int]
"""A use of a weight: its name, the number of the batch, how many uses of it that batch had before."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Positions `chosen` (P,) of one use, int32, each standing for `scale` of them."""

    chosen: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of a model: `weights` by parameter name, `fisher` (the parameter's shape) by parameter name.

    `fisher` is the mean squared gradient of each entry a prediction; `weights` lacks what no observed call
    used. `predictions` is the number of rows of output that were seen. `samples` are the positions that entered
    the moments, of each use of a weight as a product or a convolution.
    """

    weights: dict[str, WeightStatistics]
    fisher: dict[str, Tensor]
    predictions: int
    samples: dict[Place, Sample] = field(default_factory=dict)


TRANSPOSED_CONVOLUTIONS = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
TRANSPOSED_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
ATTENTION = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k",
             "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight")  # fmt: skip


class Observer(TorchFunctionMode):
    """Watches the calls of batch number `batch` that use a parameter as a weight; adds up their inputs during backward.

    Backward, because only there is it known which positions reach the output.
    """

    def __init__(self, names: dict[int, str], batch: int, generator: torch.Generator) -> None:
        super().__init__()
        self.names = Names(names)
        self.batch = batch
        self.generator = generator
        self.sums: dict[str, Sums] = {}
        self.samples: dict[Place, Sample] = {}
        self.met: Counter[str] = Counter()
        self.most = 0
        """Positions of one call, at most."""

    @property
    def draws(self) -> bool:
        """Whether backward may need the generator."""
        return self.most > ROWS_PER_CALL

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.names.transposes(func, args, out):
            return out
        if func is F.multi_head_attention_forward:
            self._attention(bound(ATTENTION, args, kwargs), out[0])
        elif isinstance(out, Tensor) and out.requires_grad:
            self._met(func, args, kwargs, out)
        return out

    def _met(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        use = self.names.use(func, args, kwargs)
        if use is not None:
            self._use(use, out)
            return
        if func is not F.embedding and func not in TRANSPOSED_CONVOLUTIONS:
            return
        call = bound(TRANSPOSED_CONVOLUTION, args, kwargs)
        name = self.names.of(call.get("weight"))
        if name is None:
            return
        if func is F.embedding:
            self._embedding(name, call["input"], call["weight"], out)
        else:
            self._transposed_convolution(name, call, out, TRANSPOSED_CONVOLUTIONS[func])

    def _sums(self, name: str, groups: int, inputs: int, transposed: bool = False) -> Sums:
        """The sums of `name`; where it was first met in another layout, sums that nothing comes of."""
        found = self.sums.get(name)
        if found is None:
            found = self.sums[name] = Sums(groups, inputs, transposed)
        elif (found.groups, found.inputs, found.transposed) != (groups, inputs, transposed):
            return Sums(groups, inputs, transposed)
        return found

    def _positions(self, alive: Tensor) -> tuple[Tensor, float]:
        """Which positions enter a moment, and how many each stands for; `alive` (P,) says which matter."""
        chosen = alive.nonzero()[:, 0]
        if len(chosen) <= ROWS_PER_CALL:
            return chosen, 1.0
        subset = torch.randint(len(chosen), (ROWS_PER_CALL,), generator=self.generator)
        return chosen[subset], len(chosen) / ROWS_PER_CALL

    def _use(self, use: Dense | Convolution, out: Tensor) -> None:
        place = (use.name, self.batch, self.met[use.name])
        self.met[use.name] += 1
        self.most = max(self.most, out.numel() // max(out.shape[use.axis], 1))

        def hook(gradient: Tensor) -> None:
            chosen, scale = self._positions(use.reached(gradient))
            self.samples[place] = Sample(chosen.to(torch.int32), scale)
            self._grouped(use.name, use.rows(chosen), scale, use.transposed)

        out.register_hook(hook)

    def _embedding(self, name: str, rows: Tensor, weight: Tensor, out: Tensor) -> None:
        def hook(gradient: Tensor) -> None:
            sums = self._sums(name, 1, weight.shape[1])
            met = rows.reshape(-1)[gradient.ne(0).any(-1).reshape(-1)]
            counts = torch.bincount(met, minlength=weight.shape[0]).cpu()
            sums.counts = counts if sums.counts is None else sums.counts + counts
            sums.uses += 1

        out.register_hook(hook)

    def _transposed_convolution(self, name: str, call: dict[str, Any], out: Tensor, axes: int) -> None:
        """Every tap meets the same pixel: the inputs are its channels; that taps overlap is left out."""
        x, groups = call["input"].detach(), call.get("groups", 1)
        if x.ndim == axes + 1:
            x = x[None]
        self.most = max(self.most, x.numel() // max(x.shape[1], 1))

        def hook(_: Tensor) -> None:
            pixels = x.movedim(1, -1).reshape(-1, x.shape[1])
            chosen, scale = self._positions(torch.ones(len(pixels), dtype=torch.bool))
            rows = pixels[chosen].reshape(len(chosen), groups, x.shape[1] // groups)
            self._grouped(name, rows, scale, transposed=True)

        out.register_hook(hook)

    def _grouped(self, name: str, rows: Tensor, scale: float, transposed: bool) -> None:
        """Adds `rows` (P, g, n)."""
        sums = self._sums(name, rows.shape[1], rows.shape[2], transposed)
        for group in range(rows.shape[1]):
            sums.add(group, rows[:, group], scale)
        sums.uses += 1

    def _attention(self, call: dict[str, Any], out: Tensor) -> None:
        """The packed in-projection meets query, key and value in its three blocks of rows; separate ones one each."""
        if not out.requires_grad:
            return
        parts = [call[part].detach() for part in ("query", "key", "value")]
        self.most = max(self.most, *(part.shape[:-1].numel() for part in parts))
        uses = [(call.get(f"{letter}_proj_weight"), [part]) for letter, part in zip("qkv", parts, strict=True)]
        for weight, met in [(call.get("in_proj_weight"), parts), *uses]:
            if name := self.names.of(weight):
                out.register_hook(partial(self._blocks, name, met))
        if (name := self.names.of(call.get("out_proj_weight"))) and (x := _projected(out)) is not None:
            self._use(Dense(name, x.detach(), transposed=False), out)

    def _blocks(self, name: str, parts: list[Tensor], _: Tensor) -> None:
        """Adds all of `parts` (..., n), one a group."""
        sums = self._sums(name, len(parts), parts[0].shape[-1])
        for block, part in enumerate(parts):
            rows = part.reshape(-1, part.shape[-1])
            chosen, scale = self._positions(torch.ones(len(rows), dtype=torch.bool))
            sums.add(block, rows[chosen], scale)
        sums.uses += 1


def _projected(out: Tensor) -> Tensor | None:
    """The input of the product that `out` is a view of, as autograd kept it for the gradient; None where it did not.

    Attention calls its output projection out of sight of every mode.
    """
    node = out.grad_fn
    for _ in range(4):
        if node is None:
            break
        for kept in ("_saved_mat1", "_saved_self"):
            x = getattr(node, kept, None)
            if isinstance(x, Tensor) and x.ndim == 2 and x.shape[0] == out.shape[:-1].numel():
                return x
        node = node.next_functions[0][0]
    return None


def _output(found: object) -> Tensor:
    """The tensor that a network returns: itself, `.logits`, or the first floating one of a tuple or dict."""
    if isinstance(found, Tensor):
        return found
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts = list(found.values()) if isinstance(found, dict) else found if isinstance(found, tuple | list) else []
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise TaskError(f"the network returns {type(found).__name__}, in which no floating tensor was found")


def call_model(model: nn.Module, batch: object) -> Tensor:
    """The model's output for a Batch: a tensor, a tuple (positional) or a dict (keyword arguments)."""
    if isinstance(batch, dict):
        return _output(model(**batch))
    if isinstance(batch, tuple | list):
        return _output(model(*batch))
    return _output(model(batch))


def probe(output: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """A random direction at the output whose covariance is the Gauss-Newton form there; `output`'s shape."""
    noise = torch.randn(output.shape, generator=generator).to(output)
    if kind == "embedding":
        return noise
    root = output.detach().softmax(-1).sqrt()
    return root * (noise - root * (root * noise).sum(-1, keepdim=True))


def _why_not_finite(tensors: Mapping[str, Tensor], batch: object) -> str:
    """What makes outputs and gradients not finite, as far as parameters, buffers and batch tell, and what to do."""
    for name, tensor in tensors.items():
        # Infinities in a buffer are mostly meant: those of a mask.
        finite = tensor.isfinite() if isinstance(tensor, nn.Parameter) else tensor.isnan().logical_not()
        if not tensor.is_meta and not bool(finite.all()):
            return f"{name!r} holds NaN or infinite values: mend it, or compress without calibration"
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
    if not all(bool(part.isfinite().all()) for part in parts if isinstance(part, Tensor)):
        return "the batch holds NaN or infinite values: replace them, or leave these samples out"
    return (
        "weights and batch are: something overflows inside the network, or is a root or a logarithm at zero. "
        "Leave such samples out, or hand over the network in float32 where it is not"
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def check_output(out: Tensor, tensors: Mapping[str, Tensor], batch: object) -> None:
    """TaskError where nothing can be learned from what the model of these `tensors` gave out."""
    if not bool(torch.isfinite(out).all()):
        raise TaskError(f"the network's output is not finite; {_why_not_finite(tensors, batch)}")
    if not out.requires_grad:
        raise TaskError(
            "no gradient leads from the network's output to its weights: return logits or embeddings, not classes, "
            "and leave no_grad, inference_mode and detach out of forward"
        )


def check_gradient(name: str, gradient: Tensor, tensors: Mapping[str, Tensor], batch: object) -> None:
    """TaskError where the gradient, or its square, of the tensor `name` is not finite."""
    if not bool(gradient.isfinite().all()):
        raise TaskError(f"the gradient of {name!r} is not finite; {_why_not_finite(tensors, batch)}")


@contextmanager
def of_batch(number: int) -> Iterator[None]:
    """TaskError, with the number of the batch, for whatever a network fails with."""
    try:
        yield
    except TaskError as error:
        raise TaskError(f"calibration batch {number + 1}: {error}") from error
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise TaskError(f"calibration batch {number + 1}: the model failed on it: {told}") from error


class _Turns:
    """Hands the generator from batch to batch, in their order: draws are those of one batch after another."""

    def __init__(self) -> None:
        self._now = 0
        self._changed = threading.Condition()

    def wait(self, batch: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._now >= batch)

    def end(self, batch: int) -> None:
        """Of that batch's turn, when it has come; a second end changes nothing."""
        self.wait(batch)
        with self._changed:
            self._now = max(self._now, batch + 1)
            self._changed.notify_all()


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one batch showed: sums and samples, the squared gradients by name, the rows of output."""

    sums: Mapping[str, Sums]
    samples: Mapping[Place, Sample]
    squares: Mapping[str, Tensor]
    predictions: int


@dataclass(frozen=True, eq=False)
class _Pass:
    """Forward and backward of batches, side by side on `models` of the same values, each with gradients of its own."""

    models: SimpleQueue[nn.Module]
    output: str
    generator: torch.Generator
    turns: _Turns = field(default_factory=_Turns)

    def seen(self, number: int, batch: object) -> _Seen:
        """Raises TaskError, with the number of the batch, where the model fails on it or something is not finite."""
        model = self.models.get()
        try:
            with of_batch(number):
                return self._seen(model, number, batch)
        finally:
            self.turns.end(number)
            self.models.put(model)

    def _seen(self, model: nn.Module, number: int, batch: object) -> _Seen:
        parameters = dict(model.named_parameters())
        observer = Observer({id(p): name for name, p in parameters.items()}, number, self.generator)
        with torch.enable_grad(), observer:
            out = call_model(model, batch)
        tensors = tensors_of(model)
        check_output(out, tensors, batch)
        self.turns.wait(number)
        direction = probe(out, self.output, self.generator)
        if not observer.draws:
            self.turns.end(number)
        out.backward(direction)
        squares = {}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares[name] = parameter.grad.float().square().cpu()
                parameter.grad = None
                check_gradient(name, squares[name], tensors, batch)
        return _Seen(observer.sums, observer.samples, squares, out.shape[:-1].numel())


def alike(model: nn.Module) -> nn.Module:
    """A copy over the same values whose parameters have gradients of their own."""
    own = {id(parameter): nn.Parameter(parameter.detach()) for parameter in model.parameters()}
    return copy.deepcopy(model, dict(own))


def collect(
    model: nn.Module, batches: Iterable[object], output: str, seed: int, progress: Callable[[], None] = lambda: None,
    threads: int = 1,
) -> Statistics:  # fmt: skip
    """Statistics of every parameter over `batches`, one forward and one backward each, `threads` at a time.

    `output` is "logits" or "embedding": what the model returns. The model is observed in eval mode and left as it
    was found, without gradients. Raises TaskError, with the number of the batch, where the model fails on it or
    output or gradients are not finite, and where there is no sample.
    """
    parameters = dict(model.named_parameters())
    required = {name: p.requires_grad for name, p in parameters.items()}
    fisher = {name: torch.zeros(p.shape) for name, p in parameters.items()}
    training = [module for module in model.modules() if module.training]
    sums: dict[str, Sums] = {}
    samples: dict[Place, Sample] = {}
    predictions = 0
    try:
        model.eval().requires_grad_(True).zero_grad()
        models: SimpleQueue[nn.Module] = SimpleQueue()
        for own in (model, *(alike(model) for _ in range(threads - 1))):
            models.put(own)
        observed = _Pass(models, output, torch.Generator().manual_seed(seed))
        with ThreadPoolExecutor(threads) as pool:
            # Batches may end in any order; they are added up in theirs.
            for one in in_order(pool, lambda at: observed.seen(*at), enumerate(batches), threads):
                predictions += one.predictions
                samples |= one.samples
                for name, squares in one.squares.items():
                    fisher[name].add_(squares)
                add_sums(sums, one.sums)
                progress()
    finally:
        for module in training:
            module.training = True
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
            parameter.grad = None
    if not predictions:
        raise TaskError(
            "calibration() gave no batch, or none with a sample in it: give at least one, or leave calibration out"
        )
    weights = {name: found.finish(name) for name, found in sums.items()}
    fisher = {name: f / predictions for name, f in fisher.items()}
    return Statistics(weights, fisher, predictions, samples)
