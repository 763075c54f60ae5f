"""Uses of weights: the inputs that each position of the output was made of, one at a time."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from factorpack.nn.uses import Convolution, Dense, Names


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Seen(TorchFunctionMode):
    """Notes the uses of one weight, and what came out."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.names = Names({id(weight): "w"})
        self.uses: list[tuple[Dense | Convolution, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        use = self.names.use(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        self.names.transposes(func, args, out)
        if use is not None:
            self.uses.append((use, out))
        return out


def used(call: Callable[[], Tensor], weight: Tensor) -> tuple[Dense | Convolution, Tensor]:
    seen = Seen(weight)
    with seen:
        call()
    ((use, out),) = seen.uses
    assert use.name == "w"
    return use, out


# --- products -------------------------------------------------------------------------------------------------

PRODUCTS = {
    "linear": (F.linear, False),
    "linear with a bias": (lambda x, w: F.linear(x, w, bias=torch.ones(len(w))), False),
    "matmul of t()": (lambda x, w: torch.matmul(x, w.t()), False),
    "@ of T": (lambda x, w: x @ w.T, False),
    "@ of mT": (lambda x, w: x @ w.mT, False),
    "transpose": (lambda x, w: x @ torch.transpose(w, 0, 1), False),
    "matmul": (torch.matmul, True),
    "a method": (lambda x, w: x.matmul(w), True),
}


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)])
@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case: str, shape: tuple[int, ...]) -> None:
    call, transposed = PRODUCTS[case]
    weight, x = nn.Parameter(rand(5, 4) if transposed else rand(4, 5)), rand(*shape, seed=1)
    use, out = used(lambda: call(x, weight), weight)
    assert isinstance(use, Dense)
    assert (use.transposed, use.groups) == (transposed, 1)
    chosen = torch.arange(x.shape[:-1].numel()).flip(0)[::2]
    rows = use.rows(chosen)
    assert torch.equal(rows, x.reshape(-1, 5)[chosen][:, None])
    # The first position's gradient alone is there.
    gradient = torch.zeros_like(out)
    gradient.reshape(-1, 4)[0, 2] = 1e-20
    assert use.reached(gradient).tolist() == [True] + [False] * (x.shape[:-1].numel() - 1)


@pytest.mark.parametrize("transposed", [True, False])
def test_addmm_adds_its_first_argument_only(transposed: bool) -> None:
    weight, x = nn.Parameter(rand(5, 4) if transposed else rand(4, 5)), rand(3, 5, seed=1)
    calls = (
        lambda: torch.addmm(torch.ones(4), x, weight if transposed else weight.t()),
        lambda: torch.addmm(mat2=weight if transposed else weight.t(), mat1=x, input=torch.ones(4), beta=2),
    )
    for call in calls:
        use, _ = used(call, weight)
        assert use.transposed is transposed
        assert torch.equal(use.rows(torch.arange(3))[:, 0], x)
    seen = Seen(weight)
    with seen:
        torch.addmm(weight, rand(len(weight), 2), rand(2, weight.shape[1]))
        weight + weight.sum()
        F.linear(x, rand(4, 5))
    assert seen.uses == []


def test_a_view_of_a_view_is_no_weight() -> None:
    weight = nn.Parameter(rand(5, 5))
    seen = Seen(weight)
    with seen:
        rand(3, 5) @ weight.t().t()
    assert seen.uses == []


# --- convolutions ---------------------------------------------------------------------------------------------

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONVOLUTIONS = {
    "1d": ((4, 3, 3), (2, 3, 8), {}),
    "1d stride, padding, dilation": ((4, 2, 3), (2, 2, 11), {"stride": 2, "padding": 3, "dilation": 2}),
    "1d unbatched": ((4, 3, 2), (3, 7), {"padding": 1}),
    "1d same, even": ((3, 2, 4), (2, 2, 9), {"padding": "same"}),
    "1d valid": ((3, 2, 4), (2, 2, 9), {"padding": "valid", "stride": 3}),
    "2d": ((4, 3, 3, 3), (2, 3, 5, 6), {"padding": 1}),
    "2d, no axis as another": (
        (4, 2, 2, 3), (2, 2, 7, 8), {"stride": (1, 2), "padding": (2, 1), "dilation": (3, 1)}
    ),
    "2d groups": ((6, 2, 3, 3), (2, 4, 6, 5), {"groups": 2, "stride": 2, "padding": 1}),
    "2d depthwise": ((8, 1, 3, 3), (2, 4, 5, 5), {"groups": 4, "padding": 1}),
    "2d same, dilation": ((3, 2, 3, 2), (2, 2, 5, 6), {"padding": "same", "dilation": (1, 2)}),
    "3d": ((3, 2, 2, 1, 3), (2, 2, 4, 3, 5), {"stride": (1, 2, 1), "padding": (1, 0, 2), "dilation": (2, 1, 1)}),
    "3d groups": ((4, 2, 2, 2, 2), (1, 4, 3, 3, 3), {"groups": 2}),
}  # fmt: skip


def met(x: Tensor, shape: tuple[int, ...], options: dict) -> Tensor:
    """(P, g, n), tap by tap with loops over all axes."""
    axes, kernel = len(shape) - 2, shape[2:]
    each = {
        part: (options.get(part, default),) * axes if isinstance(options.get(part, default), int) else options[part]
        for part, default in (("stride", 1), ("dilation", 1))
    }
    padding = options.get("padding", 0)
    if padding == "same":
        before = [d * (k - 1) // 2 for k, d in zip(kernel, each["dilation"], strict=True)]
        after = [d * (k - 1) - b for k, d, b in zip(kernel, each["dilation"], before, strict=True)]
    else:
        padding = 0 if padding == "valid" else padding
        before = after = [padding] * axes if isinstance(padding, int) else list(padding)
    space = x.shape[2:]
    places = [
        (size + b + a - d * (k - 1) - 1) // s + 1
        for size, b, a, k, s, d in zip(space, before, after, kernel, each["stride"], each["dilation"], strict=True)
    ]
    rows = []
    for sample in x:
        for place in product(*map(range, places)):
            row = torch.zeros(len(sample), *kernel)
            for tap in product(*map(range, kernel)):
                at = [
                    p * s + t * d - b
                    for p, s, t, d, b in zip(place, each["stride"], tap, each["dilation"], before, strict=True)
                ]
                if all(0 <= i < size for i, size in zip(at, space, strict=True)):
                    row[(slice(None), *tap)] = sample[(slice(None), *at)]
            rows.append(row.reshape(options.get("groups", 1), -1))
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case: str) -> None:
    shape, size, options = CONVOLUTIONS[case]
    weight, x = nn.Parameter(rand(*shape)), rand(*size, seed=1)
    use, out = used(lambda: CONVOLVE[len(shape) - 2](x, weight, **options), weight)
    assert isinstance(use, Convolution)
    assert use.groups == options.get("groups", 1)
    assert not use.transposed
    batched = x if x.ndim == len(shape) else x[None]
    expected = met(batched, shape, options)
    assert torch.equal(use.rows(torch.arange(len(expected))), expected)
    chosen = torch.tensor([len(expected) - 1, 0, len(expected) // 2])
    assert torch.equal(use.rows(chosen), expected[chosen])
    # The rows are what the output was made of, in its order: channels of a group times its kernel.
    made = torch.einsum("pgn,gon->pgo", expected, weight.reshape(use.groups, -1, expected.shape[2])).flatten(1)
    channels = out if x.ndim == len(shape) else out[None]
    torch.testing.assert_close(channels.movedim(1, -1).reshape(made.shape), made, rtol=1e-4, atol=1e-5)
    gradient = torch.zeros_like(channels)
    gradient[(-1, 1, *[-1] * (len(shape) - 2))] = 1
    assert use.reached(gradient.reshape(out.shape)).nonzero().tolist() == [[len(expected) - 1]]


def test_convolutions_of_modules_are_seen() -> None:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)
    x = rand(2, 2, 5, 5)
    use, _ = used(lambda: conv(x), conv.weight)
    assert torch.equal(use.rows(torch.arange(18)), met(x, (3, 2, 3, 3), {"stride": 2, "padding": 1}))
