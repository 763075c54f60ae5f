"""Walks behind a compressed prefix against both networks run in full, layer by layer."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factorpack.errors import TaskError, UnsupportedError
from factorpack.nn import prefix as prefix_module
from factorpack.nn.prefix import Prefix, copy_of
from factorpack.nn.state import read_state
from factorpack.nn.statistics import Statistics, collect
from factorpack.solve.layer import Layer, Met
from factorpack.solve.objective import Metric
from factorpack.tiling import Tiling

Walked = list[tuple[str, Tensor, Tensor]]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(model: nn.Module, batches: Sequence[object], output: str = "embedding") -> Prefix:
    model = model.eval()
    return Prefix(model, batches, collect(model, batches, output, 0))


def coarse(weight: np.ndarray) -> np.ndarray:
    step = 0.7 * float(weight.std())
    return (np.rint(weight / step) * step).astype(np.float32)


def walked(prefix: Prefix, change: Callable[[np.ndarray], np.ndarray] = coarse, names: frozenset[str] | None = None):
    """What a walk brought: names, moments and drifts in their order."""
    tensors, met = dict(prefix.model.named_parameters()), []

    def solve(name: str, found: Met) -> np.ndarray:
        met.append((name, found.moments, found.drift))
        return change(tensors[name].detach().float().numpy())

    prefix.walk(prefix.names if names is None else names, {}, solve)
    return met


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def means(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """E[x̂ x̂ᵀ] and E[(x − x̂) x̂ᵀ] of pairs of rows (P, n) before and behind."""
    before, now = (torch.cat([pair[side] for pair in pairs]).double() for side in (0, 1))
    moments, drift = (torch.zeros(now.shape[1], now.shape[1], dtype=torch.float64) for _ in range(2))
    for x, y in zip(before, now, strict=True):
        moments += torch.outer(y, y)
        drift += torch.outer(x - y, y)
    return moments / len(now), drift / len(now)


# --- what a walk brings ---------------------------------------------------------------------------------------


class Images(nn.Module):
    """Defined in another order than it is run in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(24, 5)
        self.third = nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2)
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x))
        return self.head(torch.tanh(self.third(x)).flatten(1))


def grouped_rows(conv: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """(P, n) of each group."""
    return [
        F.unfold(part, conv.kernel_size, padding=conv.padding, stride=conv.stride).mT.reshape(
            -1, conv.weight[0].numel()
        )
        for part in x.chunk(conv.groups, 1)
    ]


def test_halves_are_what_every_other_batch_brings() -> None:
    model, batches = Images(), [rand(3, 2, 4, 4, seed=seed) for seed in range(3)]
    tensors = dict(model.named_parameters())

    def met_by(batches: list[Tensor]) -> dict[str, Met]:
        prefix, found = of(model, batches), {}

        def solve(name: str, met: Met) -> np.ndarray:
            found[name] = met
            return coarse(tensors[name].detach().numpy())

        prefix.walk(prefix.names, {}, solve)
        return found

    alone = met_by(batches[::2]), met_by(batches[1::2])
    for name, met in met_by(batches).items():
        assert len(met.halves) == 2
        assert met.positions == sum(half.positions for half in met.halves)
        for half, expected in zip(met.halves, alone, strict=True):
            assert half.positions == expected[name].positions
            torch.testing.assert_close(half.moments, expected[name].moments)
            torch.testing.assert_close(half.drift, expected[name].drift)
    assert all(met.halves == () for met in alone[1].values())


def test_convolutions_are_met_in_the_order_they_run_on_both_networks_inputs() -> None:
    model, batches = Images(), [rand(3, 2, 4, 4, seed=seed) for seed in range(3)]
    prefix = of(model, batches)
    met = walked(prefix)
    assert [name for name, _, _ in met] == ["first.weight", "second.weight", "third.weight", "head.weight"]
    states = [(x, x) for x in batches]
    with torch.no_grad():
        for name, moments, drift in met:
            module = model.get_submodule(name.removesuffix(".weight"))
            changed = copy_of(module)
            changed.weight.copy_(torch.from_numpy(coarse(module.weight.numpy())))
            if module is model.head:
                inputs = [[(x, y)] for x, y in ((x.flatten(1), y.flatten(1)) for x, y in states)]
            else:
                inputs = [list(zip(grouped_rows(module, x), grouped_rows(module, y), strict=True)) for x, y in states]
                states = [(torch.tanh(module(x)), torch.tanh(changed(y))) for x, y in states]
            for group in range(len(moments)):
                expected = means([batch[group] for batch in inputs])
                assert_near(moments[group], expected[0])
                if name == "first.weight":
                    assert not drift.any()
                else:
                    assert_near(drift[group], expected[1])
                    assert drift[group].abs().max() > 1e-3


class Words(nn.Module):
    """Words of a vocabulary, two layers and a mean over those that are no padding."""

    def __init__(self, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 12)
        self.up = nn.Linear(12, 16)
        self.down = nn.Parameter(rand(16, 12) / 4)
        self.head = nn.Linear(12, 30 if tied else 4, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        states = self.table(tokens)
        states = states + F.gelu(self.up(states)) @ self.down
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def sentences(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, 30, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
    return tokens, mask


def test_padding_is_left_out_and_batches_may_have_lengths_of_their_own() -> None:
    model, batches = Words(), [sentences(5, 2, 3), sentences(9, 1, seed=1)]
    prefix = of(model, batches)
    met = {name: (moments, drift) for name, moments, drift in walked(prefix)}
    assert list(met) == ["up.weight", "down", "head.weight"]
    up = torch.from_numpy(coarse(model.up.weight.detach().numpy()))
    down = torch.from_numpy(coarse(model.down.detach().numpy()))
    inputs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in met}
    with torch.no_grad():
        for tokens, mask in batches:
            states, kept = model.table(tokens), mask.bool()
            inside = F.gelu(model.up(states)), F.gelu(F.linear(states, up, model.up.bias))
            ends = states + inside[0] @ model.down, states + inside[1] @ down
            inputs["up.weight"].append((states[kept], states[kept]))
            inputs["down"].append((inside[0][kept], inside[1][kept]))
            pooled = [(end * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for end in ends]
            inputs["head.weight"].append((pooled[0], pooled[1]))
    for name, (moments, drift) in met.items():
        for found, expected in zip((moments, drift), means(inputs[name]), strict=True):
            if name == "up.weight" and found is drift:
                assert not found.any()
            else:
                assert_near(found[0], expected)


@pytest.mark.parametrize("name", ["images", "words"])
def test_an_unchanged_prefix_brings_the_statistics_moments_and_no_drift(name: str) -> None:
    if name == "images":
        prefix = of(Images(), [rand(3, 2, 4, 4, seed=seed) for seed in range(2)])
    else:
        prefix = of(Words(), [sentences(5, 2, 3), sentences(4)])
    met = walked(prefix, lambda weight: weight)
    assert {name for name, _, _ in met} == prefix.names
    for name, moments, drift in met:
        assert not drift.any()
        assert_near(moments, prefix.statistics.weights[name].moments)


def test_only_a_part_of_many_positions_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = of(nn.Linear(4, 3), [rand(50, 4), rand(5, 4, seed=1)])
    monkeypatch.setattr(prefix_module, "ROWS_PER_INPUT", 10)
    ((_, moments, _),) = walked(prefix)
    # Twenty of the fifty, drawn at random, that stand for all.
    drawn = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:20]
    first, second = rand(50, 4)[drawn].double(), rand(5, 4, seed=1).double()
    assert_near(moments[0], (50 / 20 * first.T @ first + second.T @ second) / 55)


def test_what_is_placed_is_part_of_the_prefix() -> None:
    model, batches = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), [rand(9, 6)]
    prefix, met = of(model, batches), []

    def solve(name: str, found: Met) -> np.ndarray:
        met.append((name, found.moments, found.drift))
        return model[2].weight.detach().numpy()

    placed = {"0.weight": coarse(model[0].weight.detach().numpy()), "0.bias": np.zeros(8, np.float32)}
    prefix.walk(frozenset({"2.weight"}), placed, solve)
    ((name, moments, drift),) = met
    assert name == "2.weight"
    with torch.no_grad():
        now = torch.tanh(batches[0] @ torch.from_numpy(placed["0.weight"]).T)
        expected = means([(model[:2](batches[0]), now)])
    assert_near(moments[0], expected[0])
    assert_near(drift[0], expected[1])


def test_making_up_for_the_prefix_lowers_the_error_of_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6))
    # Inputs of few directions, as in trained networks: only then can a layer tell what is missing.
    mix = rand(5, 12, seed=9)
    prefix = of(model, [rand(80, 5, seed=seed) @ mix for seed in range(3)])
    fresh = rand(200, 5, seed=7) @ mix
    tensors = dict(model.named_parameters())

    def error(made_up: bool) -> float:
        found = copy_of(model)
        places = dict(found.named_parameters())

        def solve(name: str, met: Met) -> np.ndarray:
            weight = tensors[name].detach().numpy()
            if name == "0.weight":
                weight = coarse(weight)
            elif made_up:
                weight = Layer(name, weight, Tiling(weight.shape), Metric(), False).behind(met).tensor
            places[name].data.copy_(torch.from_numpy(weight))
            return weight

        prefix.walk(prefix.names, {}, solve)
        with torch.no_grad():
            return float((found(fresh) - model(fresh)).square().mean())

    assert error(made_up=True) < 0.5 * error(made_up=False)


# --- which weights are met ------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer that is used twice, two that some batches have, and one that one batch has twice and no other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("first", "twice", "left", "right", "last", "uneven"):
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x: Tensor, which: str) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        for name in which.split():
            x = torch.tanh(getattr(self, name)(x))
        return self.last(x)


def test_layers_are_met_once_whatever_way_each_batch_goes() -> None:
    ways = ("left", "right", "left right", "uneven uneven", "")
    prefix = of(Odd(), [(rand(4, 6, seed=seed), way) for seed, way in enumerate(ways)])
    assert prefix.names == {f"{name}.weight" for name in ("first", "left", "right", "last")}
    met = walked(prefix, lambda weight: weight)
    names = [name.removesuffix(".weight") for name, _, _ in met]
    assert sorted(names) == sorted(set(names)) == ["first", "last", "left", "right"]
    # All batches have come to a layer before it is solved.
    for name, moments, _ in met:
        assert_near(moments, prefix.statistics.weights[name].moments)
    assert names[0] == "first"
    assert names.index("left") < names.index("right") < names.index("last")


def test_layers_in_different_orders_are_met_once_too() -> None:
    prefix = of(Odd(), [(rand(4, 6), "left right"), (rand(4, 6, seed=1), "right left")])
    names = [name for name, _, _ in walked(prefix)]
    assert len(names) == len(set(names)) == 4


def test_look_ups_and_tied_tables_are_not_met() -> None:
    assert of(Words(), [sentences(3, 2)]).names == {"up.weight", "down", "head.weight"}
    assert of(Words(tied=True), [sentences(3, 2)]).names == {"up.weight", "down"}


def test_transposed_convolutions_and_packed_projections_are_not_met() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 3, 3), nn.Flatten(), nn.Linear(24, 2))
    prefix = of(model, [rand(3, 2, 8)])
    assert [name for name, _, _ in walked(prefix)] == ["0.weight", "3.weight"]
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    names = [name for name, _, _ in walked(of(encoder, [rand(2, 5, 8)]))]
    assert names == ["linear1.weight", "linear2.weight"]


def test_a_use_that_reaches_no_output_does_not_count() -> None:
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.layer(x)
            return self.head(x), self.head(2 * x).detach()

    prefix = of(Aside(), [rand(5, 4)])
    met = walked(prefix, lambda weight: weight)
    assert [name for name, _, _ in met] == ["layer.weight", "head.weight"]
    assert_near(met[1][1], prefix.statistics.weights["head.weight"].moments)


def test_routes_that_depend_on_values_are_no_fault() -> None:
    class Routed(nn.Module):
        """Only what is positive goes to the expert: behind a prefix other rows do."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.expert, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.gate(x)
            rows = (x[:, 0] > 0).nonzero()[:, 0]
            return self.head(x.index_add(0, rows, self.expert(x[rows])))

    prefix = of(Routed(), [rand(30, 4, seed=seed) for seed in range(3)])
    names = [name for name, _, _ in walked(prefix, lambda weight: -weight)]
    assert names == ["gate.weight", "head.weight"]


def test_modules_may_keep_what_they_saw_on_themselves() -> None:
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.first(x)
            x = self.second(torch.tanh(self.kept))
            return self.third(x + self.kept)

    prefix = of(Keeping(), [rand(3, 4), rand(5, 4, seed=1)])
    prefix.model.kept = None
    for name, moments, drift in walked(prefix, lambda weight: weight):
        assert not drift.any()
        assert_near(moments, prefix.statistics.weights[name].moments)
    assert prefix.model.kept is None


# --- threads, faults, copies ----------------------------------------------------------------------------------


class Failing(nn.Module):
    """Fails on the second batch, between its layers, once it is told to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.fails and len(x) == 3:
            raise ValueError("three rows are too many")
        return self.second(x)


def test_a_model_that_fails_is_told_and_leaves_no_thread() -> None:
    before = threading.active_count()
    prefix = of(Failing(), [rand(2, 4), rand(3, 4), rand(2, 4, seed=1)])
    prefix.model.fails = True
    with pytest.raises(TaskError, match="failed on calibration data: three rows are too many") as caught:
        walked(prefix)
    assert isinstance(caught.value.__cause__, ValueError)
    assert threading.active_count() == before


def test_a_solver_that_fails_leaves_no_thread() -> None:
    before = threading.active_count()
    prefix = of(Failing(), [rand(2, 4), rand(3, 4)])

    def solve(name: str, found: Met) -> np.ndarray:
        raise KeyError(name)

    with pytest.raises(KeyError, match="first.weight"):
        prefix.walk(prefix.names, {}, solve)
    assert threading.active_count() == before
    walked(prefix)
    assert threading.active_count() == before


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    prefix = of(Images(), [rand(4, 2, 4, 4, seed=seed) for seed in range(5)])
    found = []
    for threads in (1, 4, 4, 7):
        found.append(walked(replace(prefix, threads=threads)))
    for other in found[1:]:
        for (name, moments, drift), (as_name, as_moments, as_drift) in zip(found[0], other, strict=True):
            assert name == as_name
            assert torch.equal(moments, as_moments)
            assert torch.equal(drift, as_drift)


def test_results_do_not_depend_on_threads_of_torch() -> None:
    prefix, threads, found = of(Words(), [sentences(5, 2, 3), sentences(9, 1, seed=1)]), torch.get_num_threads(), []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            found.append(walked(prefix))
    finally:
        torch.set_num_threads(threads)
    for (_, *first), (_, *second) in zip(*found, strict=True):
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = Images()
    prefix = of(model, [rand(3, 2, 4, 4)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    walked(prefix)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_a_state_of_the_model_holds_what_a_walk_needs() -> None:
    """The names of a walk are those of the layers."""
    prefix = of(Images(), [rand(3, 2, 4, 4)])
    layers = read_state(prefix.model.state_dict(keep_vars=True), prefix.model, prefix.statistics).layers
    assert prefix.names == set(layers)
    for name, moments, drift in walked(prefix):
        behind = layers[name].behind(Met(moments, drift, 1))
        assert behind.tensor.shape == layers[name].tensor.shape


def test_nothing_is_met_without_samples() -> None:
    assert Prefix(nn.Linear(2, 2), [], Statistics({}, {}, 1)).names == frozenset()


@pytest.mark.parametrize("by", ["object", "memory"])
def test_copies_keep_ties(by: str) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False))
    if by == "object":
        model[1].weight = model[0].weight
    else:
        model[1].weight.data = model[0].weight.data
    found = copy_of(model)
    assert found[0].weight.data_ptr() == found[1].weight.data_ptr() != model[0].weight.data_ptr()
    with torch.no_grad():
        found[1].weight.fill_(3)
    assert bool((found[0].weight == 3).all())
    assert not bool((model[0].weight == 3).any())
    assert torch.equal(found[2].weight, model[2].weight)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(UnsupportedError, match=r"cannot be copied \(copy.deepcopy\)"):
        copy_of(model)
