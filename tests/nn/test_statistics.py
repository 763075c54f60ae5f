"""Statistics against the sums written out: every way that a network can use a weight must give its true inputs."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from factorpack.errors import TaskError
from factorpack.nn import statistics
from factorpack.nn.statistics import Statistics, collect


class Network(nn.Module):
    """Modules by name, and a function that calls them."""

    def __init__(self, forward: Callable[..., object], **modules: nn.Module | nn.Parameter):
        super().__init__()
        self.call = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args, **kwargs):
        return self.call(self, *args, **kwargs)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def collected(model: nn.Module, *batches: object, output: str = "embedding", seed: int = 0) -> Statistics:
    return collect(model, batches, output, seed)


def moments_of(*rows: Tensor) -> Tensor:
    """(1, n, n), one product of one row at a time."""
    entries = torch.cat([part.detach().double().reshape(-1, part.shape[-1]) for part in rows])
    total = torch.zeros(entries.shape[1], entries.shape[1], dtype=torch.float64)
    for row in entries:
        total += torch.outer(row, row)
    return (total / len(entries)).float()[None]


def assert_moments(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def patches(conv: nn.Module, x: Tensor) -> list[Tensor]:
    """What each group's kernel meets (P, n): the input convolved with one-hot kernels."""
    width = conv.weight.shape[1:].numel()
    kernels = torch.eye(width).reshape(width, *conv.weight.shape[1:])
    found = []
    for part in x.chunk(conv.groups, dim=-conv.weight.ndim + 1):
        convolve = CONVOLVE[conv.weight.ndim - 2]
        out = convolve(part, kernels, None, conv.stride, conv.padding, conv.dilation)
        found.append(out.movedim(-conv.weight.ndim + 1, -1).reshape(-1, width))
    return found


# --- dense layers ---------------------------------------------------------------------------------------------


def test_linear_over_batches_of_different_sizes() -> None:
    model, batches = nn.Linear(5, 3), [rand(4, 5), rand(2, 3, 5, seed=1), rand(5, seed=2)]
    found = collected(model, *batches)
    assert_moments(found.weights["weight"].moments, moments_of(*batches))
    weight = found.weights["weight"]
    assert (weight.positions, weight.uses, weight.transposed, weight.embedding) == (11, 3, False, False)
    assert found.predictions == 4 + 6 + 1
    assert "bias" not in found.weights
    assert found.fisher["bias"].shape == (3,)


def test_one_layer_used_twice_gets_both_inputs() -> None:
    layer, x = nn.Linear(4, 4), rand(6, 4)
    model = Network(lambda self, x: self.layer(torch.tanh(self.layer(x))), layer=layer)
    found = collected(model, x).weights["layer.weight"]
    assert_moments(found.moments, moments_of(x, torch.tanh(layer(x))))
    assert found.uses == 2


def test_activations_in_place_change_nothing() -> None:
    first, second, x = nn.Linear(4, 6), nn.Linear(6, 2), rand(5, 4)
    found = collected(nn.Sequential(first, nn.ReLU(inplace=True), second), x)
    alive = (first(x) > 0).any(1)
    assert_moments(found.weights["0.weight"].moments, moments_of(x[alive]))
    assert_moments(found.weights["2.weight"].moments, moments_of(torch.relu(first(x))))


BARE = {
    "x @ W": (lambda self, x: x @ self.w, True),
    "matmul by keyword": (lambda self, x: torch.matmul(x, other=self.w), True),
    "mm by keywords": (lambda self, x: torch.mm(mat2=self.w, input=x), True),
    "addmm": (lambda self, x: torch.addmm(torch.ones(4), x, self.w), True),
    "addmm by keywords": (lambda self, x: torch.addmm(torch.ones(4), mat2=self.w, mat1=x, alpha=2), True),
    "W.T": (lambda self, x: x @ self.w.T, False),
    "W.t()": (lambda self, x: torch.mm(x, self.w.t()), False),
    "transpose": (lambda self, x: x @ self.w.transpose(0, 1), False),
    "mT": (lambda self, x: x @ self.w.mT, False),
    "linear": (lambda self, x: functional.linear(x, self.w), False),
    "linear by keywords": (lambda self, x: functional.linear(input=x, weight=self.w), False),
}


@pytest.mark.parametrize("use", BARE)
def test_bare_parameters(use: str) -> None:
    forward, transposed = BARE[use]
    inputs = 6
    model = Network(forward, w=nn.Parameter(rand(inputs, 4) if transposed else rand(4, inputs)))
    x = rand(7, inputs, seed=1)
    found = collected(model, x).weights["w"]
    assert_moments(found.moments, moments_of(x))
    assert found.transposed is transposed
    assert not found.embedding


def test_products_that_no_layout_fits_are_left_alone() -> None:
    def forward(self, x):
        return (x @ self.stack).mean(0) @ self.vector

    model = Network(forward, stack=nn.Parameter(rand(2, 3, 4)), vector=nn.Parameter(rand(4, seed=1)))
    assert collected(model, rand(2, 5, 3)).weights == {}


@pytest.mark.parametrize("width", [5, 8])
def test_a_weight_that_is_used_both_ways_keeps_to_one_of_them(width: int) -> None:
    """Tied autoencoders: the sums of one layout must not be mixed with those of the other."""
    weight, x = nn.Parameter(rand(5, width)), rand(6, width, seed=1)
    model = Network(lambda self, x: torch.mm(functional.linear(x, self.w), self.w), w=weight)
    found = collected(model, x).weights["w"]
    assert_moments(found.moments, moments_of(functional.linear(x, weight) if found.transposed else x))
    assert found.uses == 1


# --- convolutions ---------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "1d stride, padding, dilation": (nn.Conv1d(2, 4, 3, stride=2, padding=3, dilation=2), (2, 2, 11)),
    "1d same, even kernel": (nn.Conv1d(2, 3, 4, padding="same"), (2, 2, 8)),
    "1d same, even kernel, dilation": (nn.Conv1d(2, 3, 4, padding="same", dilation=3), (1, 2, 14)),
    "1d valid": (nn.Conv1d(2, 3, 4, padding="valid"), (2, 2, 8)),
    "2d": (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 6, 5)),
    "2d, no axis as another": (
        nn.Conv2d(2, 4, (2, 3), stride=(1, 2), padding=(2, 1), dilation=(3, 1)),
        (2, 2, 7, 8),
    ),
    "2d groups": (nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (2, 6, 7, 7)),
    "2d depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "2d same": (nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)), (2, 2, 5, 6)),
    "2d 1x1": (nn.Conv2d(4, 3, 1), (2, 4, 3, 3)),
    "3d": (nn.Conv3d(2, 3, (2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(2, 1, 1)), (2, 2, 4, 3, 5)),
    "3d groups": (nn.Conv3d(4, 2, 2, groups=2), (1, 4, 3, 3, 3)),
    "1d unbatched": (nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "2d unbatched, groups": (nn.Conv2d(4, 2, 3, groups=2), (4, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case: str) -> None:
    conv, shape = CONVOLUTIONS[case]
    x = rand(*shape)
    found = collected(conv, x).weights["weight"]
    assert found.moments.shape[0] == conv.groups
    assert_moments(found.moments, torch.cat([moments_of(rows) for rows in patches(conv, x)]))
    assert found.positions == len(patches(conv, x)[0])
    assert not found.transposed


def test_a_convolution_that_pads_inside_forward() -> None:
    class Same(nn.Conv2d):
        def forward(self, x):
            return functional.conv2d(functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)

    conv, x = Same(3, 4, 3, stride=2), rand(2, 3, 6, 8)
    rows = functional.unfold(functional.pad(x, (0, 1, 0, 1)), 3, stride=2).mT
    assert_moments(collected(conv, x).weights["weight"].moments, moments_of(rows))


def test_a_padding_mode() -> None:
    conv, x = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), rand(2, 2, 5, 5)
    rows = functional.unfold(functional.pad(x, (1, 1, 1, 1), mode="reflect"), 3).mT
    assert_moments(collected(conv, x).weights["weight"].moments, moments_of(rows))


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_meet_channels(groups: int) -> None:
    conv, x = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups), rand(2, 4, 5, 5)
    found = collected(conv, x).weights["weight"]
    pixels = x.movedim(1, -1).reshape(-1, 4).chunk(groups, 1)
    assert_moments(found.moments, torch.cat([moments_of(part) for part in pixels]))
    assert found.transposed
    unbatched = collected(conv, x[0]).weights["weight"]
    assert_moments(unbatched.moments, torch.cat([moments_of(part[:25]) for part in pixels]))


# --- embeddings and attention ---------------------------------------------------------------------------------


def test_an_embedding_that_is_only_looked_up_has_the_identity() -> None:
    model = Network(lambda self, tokens: self.table(tokens), table=nn.Embedding(9, 4))
    found = collected(model, torch.tensor([[1, 2, 2], [0, 1, 8]])).weights["table.weight"]
    assert torch.equal(found.moments, torch.eye(4)[None])
    assert found.embedding
    assert found.positions == 6
    fisher = collected(model, torch.tensor([[1, 2]])).fisher["table.weight"]
    assert fisher[[1, 2]].ne(0).all()
    assert not fisher[[0, 3, 8]].any()


@pytest.mark.parametrize("head", ["linear", "transpose"])
def test_a_tied_embedding_gets_both_uses(head: str) -> None:
    table, mix, tokens = nn.Embedding(9, 4), nn.Linear(4, 4), torch.tensor([[1, 2, 2], [0, 1, 8]])

    def forward(self, tokens):
        states = self.mix(self.table(tokens))[:, :2]
        weight = self.table.weight
        return functional.linear(states, weight) if head == "linear" else states @ weight.T

    found = collected(Network(forward, table=table, mix=mix), tokens).weights["table.weight"]
    dense = moments_of(mix(table(tokens))[:, :2])
    # Four positions are multiplied and four looked up: the other two reach no output.
    looked_up = dense[0].diagonal().mean() * torch.eye(4)[None]
    assert_moments(found.moments, 0.5 * dense + 0.5 * looked_up)
    assert (found.uses, found.positions, found.embedding, found.transposed) == (2, 8, False, False)


def attention(**options: int) -> Network:
    module = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    return Network(lambda self, q, k, v: self.attention(q, k, v)[0], attention=module)


def test_the_in_projection_of_attention_has_three_blocks() -> None:
    parts = (rand(2, 3, 8), rand(2, 5, 8, seed=1), rand(2, 5, 8, seed=2))
    found = collected(attention(), parts).weights
    assert_moments(found["attention.in_proj_weight"].moments, torch.cat([moments_of(part) for part in parts]))


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 7}, {"bias": False}])
def test_the_other_projections_of_attention(options: dict[str, int]) -> None:
    model = attention(**options)
    parts = (rand(2, 3, 8), rand(2, 5, options.get("kdim", 8), seed=1), rand(2, 5, options.get("vdim", 8), seed=2))
    found = collected(model, parts).weights
    if "kdim" in options:
        for letter, part in zip("qkv", parts, strict=True):
            assert_moments(found[f"attention.{letter}_proj_weight"].moments, moments_of(part))
    # With the identity as its output projection, attention returns that projection's inputs.
    inner = copy.deepcopy(model)
    inner.attention.out_proj = nn.Linear(8, 8)
    inner.attention.out_proj.weight.data = torch.eye(8)
    inner.attention.out_proj.bias.data.zero_()
    assert_moments(found["attention.out_proj.weight"].moments, moments_of(inner(*parts)))


# --- which positions count ------------------------------------------------------------------------------------


def test_positions_that_do_not_reach_the_output_are_left_out() -> None:
    x, mask = rand(2, 6, 4), torch.tensor([[1.0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])

    def forward(self, x, mask):
        states = self.conv(self.layer(x).mT).mT
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    model = Network(forward, layer=nn.Linear(4, 5), conv=nn.Conv1d(5, 3, 1))
    found = collected(model, (x, mask)).weights
    kept = x[mask.bool()]
    assert_moments(found["layer.weight"].moments, moments_of(kept))
    assert_moments(found["conv.weight"].moments, moments_of(model.layer(kept)))
    assert found["conv.weight"].positions == 8


def test_a_layer_without_effect_is_no_embedding() -> None:
    model = Network(lambda self, x: self.layer(x) + 0 * self.dead(x), layer=nn.Linear(4, 2), dead=nn.Linear(4, 2))
    found = collected(model, rand(3, 4))
    assert not found.weights["dead.weight"].embedding
    assert not found.fisher["dead.weight"].any()


def test_a_random_part_of_many_positions_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rand(200, 3) * torch.tensor([1.0, 2.0, 0.5]) + 1
    monkeypatch.setattr(statistics, "ROWS_PER_CALL", 16)
    once = collected(nn.Linear(3, 2), x)
    assert once.weights["weight"].positions == 200
    assert not torch.allclose(once.weights["weight"].moments, moments_of(x))
    seeds = [collected(nn.Linear(3, 2), x, seed=seed).weights["weight"].moments for seed in range(600)]
    torch.testing.assert_close(torch.stack(seeds).mean(0), moments_of(x), rtol=0.04, atol=0.04)


# --- Fisher information ---------------------------------------------------------------------------------------


def test_fisher_of_a_softmax_classifier_is_the_exact_one_in_the_mean() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), 2 * rand(16, 3)
    p = model(x).softmax(-1).detach()
    exact = torch.einsum("sc,sj->cj", p * (1 - p), x.square()) / len(x)
    found = torch.stack(
        [collected(model, *[x] * 500, output="logits", seed=seed).fisher["weight"] for seed in range(6)]
    ).mean(0)
    torch.testing.assert_close(found.sum(), exact.sum(), rtol=0.04, atol=0)
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0.01)


def test_fisher_of_an_embedding_is_the_squared_jacobian_in_the_mean() -> None:
    x = rand(8, 3)
    found = collected(nn.Linear(3, 4), *[x] * 2000).fisher["weight"]
    torch.testing.assert_close(found, x.square().mean(0).expand(4, 3), rtol=0.15, atol=0.01)


# --- the contract of collect ----------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was_found() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(27, 2))
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    collected(model, rand(4, 2, 5, 5))
    assert [module.training for module in model] == [True, True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_model_is_restored_after_an_error() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(TaskError, match="calibration batch 2"):
        collected(model, rand(4, 3), rand(4, 5))
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_that_were_there_before_do_not_count() -> None:
    model, x = nn.Linear(3, 2), rand(4, 3)
    clean = collected(model, x).fisher["weight"]
    (1e3 * model(x)).sum().backward()
    assert torch.equal(collected(model, x).fisher["weight"], clean)


def test_equal_seeds_give_equal_statistics() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), rand(5, 4)
    first, again, other = (collected(model, x, output="logits", seed=seed) for seed in (1, 1, 2))
    for name in first.fisher:
        assert torch.equal(first.fisher[name], again.fisher[name])
        assert not torch.equal(first.fisher[name], other.fisher[name])
    for name, weight in first.weights.items():
        assert torch.equal(weight.moments, again.weights[name].moments)


def test_batches_may_be_tensors_tuples_lists_and_dicts() -> None:
    model = Network(lambda self, x, shift=0.0: self.layer(x + shift), layer=nn.Linear(3, 2))
    x = rand(4, 3)
    plain = collected(model, x).weights["layer.weight"].moments
    for batch in ((x,), [x], {"x": x}):
        assert torch.equal(collected(model, batch).weights["layer.weight"].moments, plain)
    for batch in ((x, 1.0), {"x": x, "shift": 1.0}):
        assert_moments(collected(model, batch).weights["layer.weight"].moments, moments_of(x + 1))


RESULTS = {
    "logits": lambda y: SimpleNamespace(loss=None, logits=y),
    "tuple": lambda y: (torch.ones(3, dtype=torch.long), y, 2 * y),
    "list": lambda y: [y],
    "dict": lambda y: {"tokens": torch.ones(3, dtype=torch.long), "states": y},
}


@pytest.mark.parametrize("result", RESULTS)
def test_a_model_may_return_its_output_in_a_wrapper(result: str) -> None:
    layer, x = nn.Linear(3, 2), rand(4, 3)
    wrapped = Network(lambda self, x: RESULTS[result](self.layer(x)), layer=layer)
    found = collected(wrapped, x)
    assert torch.equal(found.fisher["layer.weight"], collected(layer, x).fisher["weight"])
    assert found.predictions == 4


@pytest.mark.parametrize("result", [{"tokens": torch.ones(2, dtype=torch.long)}, (), None, "text"])
def test_a_model_without_a_tensor_is_refused(result: object) -> None:
    with pytest.raises(TaskError, match=type(result).__name__):
        collected(Network(lambda self, x: result, layer=nn.Linear(3, 2)), rand(4, 3))


def test_no_batch_is_refused() -> None:
    with pytest.raises(TaskError, match="no batch"):
        collected(nn.Linear(3, 2))


def test_progress_is_told_of_every_batch() -> None:
    told = []
    collect(nn.Linear(3, 2), [rand(4, 3)] * 3, "embedding", 0, lambda: told.append(1))
    assert len(told) == 3


class Failing(nn.Module):
    """Fails on batches of three samples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            raise ValueError("three")
        return self.layer(x)


@pytest.mark.parametrize("most", [8192, 10], ids=["no draws in backward", "draws in backward"])
def test_batches_side_by_side_give_the_bits_of_one_after_another(most, monkeypatch):
    monkeypatch.setattr("factorpack.nn.statistics.ROWS_PER_CALL", most)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    batches = [rand(size, 2, 8, 8) for size in (5, 2, 9, 1, 4, 3)]
    one, *others = (collect(model, batches, "logits", 0, threads=threads) for threads in (1, 2, 7))
    for other in others:
        assert other.predictions == one.predictions
        assert list(other.samples) == list(one.samples)
        assert all(torch.equal(other.samples[place].chosen, one.samples[place].chosen) for place in one.samples)
        assert all(torch.equal(other.fisher[name], one.fisher[name]) for name in one.fisher)
        for name, seen in one.weights.items():
            assert torch.equal(other.weights[name].moments, seen.moments)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_that_fails_among_others_is_named(threads):
    batches = [rand(size, 4) for size in (2, 5, 3, 2, 4)]
    with pytest.raises(TaskError, match="^calibration batch 3: the model failed on it: ValueError: three$"):
        collect(Failing(), batches, "embedding", 0, threads=threads)
