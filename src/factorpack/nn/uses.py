"""Uses of parameters as weights, found by identity in the calls of torch.nn.functional.

Letters: g groups, n inputs of one group, P positions (samples x places where a weight is applied).

By identity and not by module, so that layers that pad inside `forward`, tied heads that are used functionally and
attention in-projections are seen with their true inputs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
PRODUCTS = (
    dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ("input", "other"))
    | dict.fromkeys((torch.mm, Tensor.mm), ("input", "mat2"))
    | dict.fromkeys((torch.addmm, Tensor.addmm), ("input", "mat1", "mat2"))
)
TRANSPOSES = {torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__, torch.transpose, Tensor.transpose}  # type: ignore[attr-defined]


def spread(value: int | Iterable[int], axes: int) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


def bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; what is not given is absent."""
    return dict(zip(names, args, strict=False)) | kwargs


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """The padding of a convolution as torch.nn.functional.pad takes it: last axis first, before and after."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(t // 2, t - t // 2) for t in total]
    else:
        pairs = [(p, p) for p in spread(padding, len(kernel))]
    return [p for pair in reversed(pairs) for p in pair]


def _patches(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """View of padded `x` (N, C, *space) as (N, *places, C, *kernel), without a copy."""
    axes = len(kernel)
    for axis in range(axes):
        reach = (kernel[axis] - 1) * dilation[axis] + 1
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    return x.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))


@dataclass(frozen=True, eq=False)
class Dense:
    """The weight `name` times `inputs` (..., n); `transposed` says that its first axis meets them."""

    name: str
    inputs: Tensor
    transposed: bool
    groups: int = 1
    axis = -1
    """Of the output: the one along which a position lies."""

    def rows(self, chosen: Tensor) -> Tensor:
        """The inputs (P, 1, n) at positions `chosen` (P,)."""
        return self.inputs.reshape(self.inputs.shape[:-1].numel(), self.inputs.shape[-1])[chosen][:, None]

    def reached(self, gradient: Tensor) -> Tensor:
        """Which positions (P,) the output's `gradient` reaches."""
        return gradient.ne(0).any(self.axis).reshape(-1)


@dataclass(frozen=True, eq=False)
class Convolution:
    """The weight `name` over `inputs` (N, C, *space), before they are padded."""

    name: str
    inputs: Tensor
    weight: Tensor
    call: dict[str, Any]
    transposed: bool = False

    @property
    def axis(self) -> int:
        """Of the output: the one along which a position lies."""
        # Counted from the end: a single sample comes without an axis of its own.
        return 1 - self.weight.ndim

    @property
    def groups(self) -> int:
        return int(self.call.get("groups", 1))

    @property
    def _places(self) -> Tensor:
        kernel = tuple(self.weight.shape[2:])
        axes = len(kernel)
        stride, dilation = (spread(self.call.get(part, 1), axes) for part in ("stride", "dilation"))
        padded = F.pad(self.inputs, _padding(self.call.get("padding", 0), kernel, dilation))
        return _patches(padded, kernel, stride, dilation)

    def rows(self, chosen: Tensor) -> Tensor:
        """The inputs (P, g, n) of positions `chosen` (P,)."""
        patches = self._places
        rows = patches[torch.unravel_index(chosen, patches.shape[: self.weight.ndim - 1])]
        return rows.reshape(len(chosen), self.groups, self.weight.shape[1:].numel())

    def reached(self, gradient: Tensor) -> Tensor:
        """Which positions (P,) the output's `gradient` reaches."""
        return gradient.ne(0).any(self.axis).reshape(-1)


@dataclass(eq=False)
class Names:
    """Parameters by identity, and the transposed views of them that calls made on the way."""

    names: dict[int, str]
    views: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def of(self, tensor: object) -> str | None:
        return self.names.get(id(tensor))

    def transposes(self, func: Callable[..., Any], args: tuple[Any, ...], out: Any) -> bool:
        """Notes the view where the call was a transpose of a weight."""
        if func in TRANSPOSES and id(args[0]) in self.names and args[0].ndim == 2:
            # The view is kept alive, so that its id stays its own.
            self.views[id(out)] = (out, self.names[id(args[0])])
            return True
        return False

    def use(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Dense | Convolution | None:
        """The product or convolution that a call is, where it is one of a weight."""
        if func in PRODUCTS:
            call = bound(PRODUCTS[func], args, kwargs)
            x, weight = (call[part] for part in PRODUCTS[func][-2:])
            if isinstance(weight, Tensor) and weight.ndim == 2 and id(weight) in self.names:
                return Dense(self.names[id(weight)], x.detach(), transposed=True)
            if id(weight) in self.views:
                return Dense(self.views[id(weight)][1], x.detach(), transposed=False)
            return None
        if func is not F.linear and func not in CONVOLUTIONS:
            return None
        call = bound(CONVOLUTION, args, kwargs)
        name = self.of(call["weight"])
        if name is None:
            return None
        x = call["input"].detach()
        if func is F.linear:
            return Dense(name, x, transposed=False)
        return Convolution(name, x[None] if x.ndim == CONVOLUTIONS[func] + 1 else x, call["weight"], call)
