import numpy as np
import pytest
import torch
from torch import Tensor, nn

from factorpack.errors import MismatchError
from factorpack.nn.state import (
    LOOKUP_SMOOTHING,
    LOOKUP_WEIGHT,
    UNSEEN_WEIGHT,
    batch_norm_curvature,
    lookup_weights,
    read_state,
)
from factorpack.nn.statistics import collect
from factorpack.nn.stored import SMALL
from factorpack.solve.objective import distortion


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 16)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("places", torch.arange(6).reshape(2, 3))
        self.register_buffer("grid", rand(10, 10, seed=1))
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.table(tokens))))


def state_of(model, *batches, exclude=()):
    statistics = collect(model, batches, "embedding", 0) if batches else None
    return read_state(model.state_dict(keep_vars=True), model, statistics, exclude)


TOKENS = torch.tensor([[1, 2, 3], [4, 4, 1]])

# --- what is what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [(), (TOKENS,)])
def test_every_name_is_in_one_place(batches: tuple[Tensor, ...]) -> None:
    model = Tied()
    state = state_of(model, *batches)
    assert set(state.layers) == {"table.weight", "mix.weight", "idle.weight"}
    # Two axes make no layer of a buffer: nothing is multiplied with it that statistics could see.
    assert set(state.small) == {"mix.bias", "idle.bias", "grid", "scale"}
    assert set(state.exact) == {"places"}
    assert state.aliases == {"head.weight": "table.weight"}
    assert list(state.dtypes) == list(model.state_dict())
    assert state.dtypes["places"] == "int64"


def test_integers_come_back_exactly() -> None:
    tensors = {
        "wide": torch.tensor([2**62 + 1, -(2**63)]),
        "flag": torch.tensor([True, False]),
        "byte": torch.arange(256).to(torch.uint8).reshape(16, 16),
        "count": torch.tensor(7),
    }
    state = read_state(tensors)
    assert not state.layers
    assert not state.small
    for name, tensor in tensors.items():
        assert state.exact[name].dtype == tensor.numpy().dtype
        assert state.exact[name].shape == tuple(tensor.shape)
        assert np.array_equal(state.exact[name], tensor.numpy())
    assert state.dtypes == {"wide": "int64", "flag": "bool", "byte": "uint8", "count": "int64"}


def test_what_is_not_finite_or_empty_is_kept_exactly() -> None:
    tensors = {
        "mask": torch.full((16, 16), -torch.inf).triu(1),
        "nan": torch.tensor([1.0, torch.nan]),
        "empty": torch.zeros(0, 3),
        "plain": rand(16, 16),
    }
    state = read_state(tensors)
    assert set(state.exact) == {"mask", "nan", "empty"}
    for name, found in state.exact.items():
        np.testing.assert_array_equal(found, tensors[name].numpy())
    assert set(state.layers) == {"plain"}


def test_few_entries_are_no_layer() -> None:
    assert SMALL == 64
    state = read_state({"below": rand(9, 7), "at": rand(8, 8), "long": rand(1000), "kernel": rand(4, 2, 3, 3)})
    assert set(state.layers) == {"at", "kernel"}
    assert set(state.small) == {"below", "long"}
    assert np.array_equal(state.small["below"].values, rand(9, 7).numpy())


def test_shapes_without_axes_stay_so() -> None:
    state = read_state({"scale": torch.tensor(2.5), "half": torch.tensor(0.5, dtype=torch.float16)})
    assert state.small["scale"].values.shape == ()
    assert state.small["half"].values.dtype == np.float32
    assert state.small["half"].curvature is None
    assert state.dtypes["half"] == "float16"


def test_narrow_floats_are_read_as_they_are() -> None:
    weight = rand(8, 8).to(torch.bfloat16)
    state = read_state({"weight": weight, "kept": weight.clone()}, exclude=["kept"])
    for found in (state.layers["weight"].tensor, state.exact["kept"]):
        assert np.array_equal(found, weight.float().numpy())
    assert state.dtypes["weight"] == "bfloat16"


def test_tensors_are_copies() -> None:
    model = nn.Linear(16, 8)
    state, before = state_of(model), model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    assert np.array_equal(state.layers["weight"].tensor, before.numpy())


# --- exclude --------------------------------------------------------------------------------------------------


def test_excluded_tensors_are_kept_exactly() -> None:
    model = Tied()
    state = state_of(model, TOKENS, exclude=["mix.*", "scale"])
    assert set(state.exact) == {"places", "mix.weight", "mix.bias", "scale"}
    assert np.array_equal(state.exact["mix.weight"], model.mix.weight.detach().numpy())
    assert "mix.weight" not in state.layers


@pytest.mark.parametrize("pattern", ["head.weight", "table.*"])
def test_excluding_one_name_of_a_tied_tensor_excludes_it(pattern: str) -> None:
    state = state_of(Tied(), exclude=[pattern])
    assert "table.weight" in state.exact
    assert state.aliases == {"head.weight": "table.weight"}


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"decoder\.\*.*table\.weight|decoder\.\*.*places"):
        state_of(Tied(), exclude=["mix.*", "decoder.*"])


# --- what errors cost -----------------------------------------------------------------------------------------


def test_weights_that_were_not_seen_are_named() -> None:
    assert state_of(Tied(), TOKENS).unseen == ("idle.weight",)
    assert state_of(Tied()).unseen == ()


def test_an_unseen_weight_counts_as_much_as_the_typical_one() -> None:
    state = state_of(Tied(), TOKENS)
    powers = {}
    for name, layer in state.layers.items():
        weight = layer.problem.weight
        powers[name] = float(distortion(weight, torch.zeros_like(weight), layer.metric))
    seen = sorted((powers["table.weight"], powers["mix.weight"]))
    assert seen[0] <= powers["idle.weight"] <= seen[1]
    assert state.layers["idle.weight"].metric.moments is None


def test_without_statistics_losses_are_relative() -> None:
    state = read_state({"large": 100 * rand(16, 16), "tiny": 0.01 * rand(16, 16, seed=1)})
    lost = []
    for layer in state.layers.values():
        weight = layer.problem.weight
        lost.append(float(distortion(weight, 0.9 * weight, layer.metric)))
    assert lost[0] == pytest.approx(lost[1], rel=1e-4)
    assert lost[0] > 0


def test_row_weights_bring_the_scale_of_the_fisher_information() -> None:
    """Σ_o r_o·tr H is what the squared gradients add up to; rows that matter more weigh more."""
    model, x = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3, bias=False)), rand(40, 12)
    with torch.no_grad():
        model[1].weight[:, 0] *= 30
        model[1].weight[:, 1] = 0
    statistics = collect(model, [x], "embedding", 0)
    layer = state_of(model, x).layers["0.weight"]
    rows, moments = layer.metric.row_weights, layer.metric.moments
    assert torch.equal(moments, statistics.weights["0.weight"].moments)
    total = float(rows.sum() * moments[0].trace())
    assert total == pytest.approx(float(statistics.fisher["0.weight"].sum()), rel=1e-3)
    assert rows.argmax() == 0
    assert rows.argmin() == 1
    assert rows.min() > 0


def test_layouts_follow_from_the_use() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 2, groups=2))
    layers = state_of(model, rand(2, 4, 6, 6)).layers
    conv, transposed = layers["0.weight"], layers["1.weight"]
    assert (conv.tiling.groups, conv.tiling.transposed, conv.tiling.matrix_shape) == (2, False, (8, 18))
    assert conv.metric.moments.shape == (2, 18, 18)
    assert (transposed.tiling.groups, transposed.tiling.transposed) == (2, True)
    assert transposed.metric.moments.shape == (2, 4, 4)
    for layer in (conv, transposed):
        assert layer.problem.weight.shape == layer.tiling.matrix_shape
        assert torch.isfinite(distortion(layer.problem.weight, 0 * layer.problem.weight, layer.metric))


def test_row_weights_of_a_group_are_relative_to_its_own_inputs() -> None:
    """Each row is weighed by the gradient of its output, which knows nothing of how strong the inputs are."""
    model, x = nn.Conv1d(8, 12, 2, groups=2), rand(4, 8, 10)
    x[:, 4:] *= 30
    rows = state_of(model, *[x] * 30).layers["weight"].metric.row_weights
    assert 0.5 < float(rows[:6].mean() / rows[6:].mean()) < 2


def test_rows_that_are_looked_up_are_never_worthless() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    layer = state_of(model, TOKENS).layers["0.weight"]
    assert layer.looked_up
    assert layer.metric.moments is None
    rows = layer.metric.row_weights
    assert rows.min() > 0
    assert rows[[1, 2, 3, 4]].min() > rows[[0, 5, 19]].max()
    tied = state_of(Tied(), TOKENS).layers["table.weight"]
    assert not tied.looked_up
    assert tied.metric.moments is not None


def test_small_tensors_carry_their_fisher_information() -> None:
    model, x = nn.Linear(16, 8), rand(5, 16)
    statistics = collect(model, [x], "logits", 0)
    small = read_state(model.state_dict(keep_vars=True), model, statistics).small["bias"]
    assert np.array_equal(small.curvature, statistics.fisher["bias"].numpy())


# --- rows that are looked up ----------------------------------------------------------------------------------


def zipf(rows: int, drawn: int, seed: int) -> tuple[Tensor, Tensor]:
    """Shares of a vocabulary, the most frequent row first, and how often each came up in `drawn` look-ups."""
    shares = 1 / (torch.arange(rows) + 3.0)
    shares = shares / shares.sum()
    places = torch.multinomial(shares, drawn, replacement=True, generator=torch.Generator().manual_seed(seed))
    return shares, torch.bincount(places, minlength=rows)


@pytest.mark.parametrize(("rows", "drawn"), [(30_000, 20_000), (5000, 1000), (3000, 20_000)])
def test_unseen_rows_count_together_what_falls_to_them(rows: int, drawn: int) -> None:
    ratios, halves = [], []
    for seed in range(5):
        shares, counts = zipf(rows, drawn, seed)
        unseen = counts == 0
        found = lookup_weights(counts / drawn, counts)
        ratios.append(float(found[unseen].sum() / UNSEEN_WEIGHT / shares[unseen].sum()))
        # Where rows are sorted, so are the unseen ones.
        first, second = found[unseen].chunk(2)
        halves.append(float(first.mean() / second.mean()))
    assert 0.75 < np.mean(ratios) < 1.25, ratios
    assert min(halves) > (1.2 if rows > 3000 else 0.8), halves


def test_rows_that_were_often_seen_keep_their_weight() -> None:
    _, counts = zipf(3000, 20_000, 0)
    # What an error of a look-up counts differs from row to row.
    weights = counts / 20_000 * rand(3000).mul(0.5).exp()
    found = lookup_weights(weights, counts)
    often = counts > 50
    assert (found[often] / weights[often] - 1).abs().max() < 0.1
    # Those met once stand between their own and their kind's mean, less what falls to unseen rows.
    once = counts == 1
    left = found[once] / (weights[once] + weights[once].mean())
    torch.testing.assert_close(left, left[:1].expand_as(left))
    assert 0 < left[0] < 0.4


def test_unseen_rows_take_their_part_from_those_that_were_met() -> None:
    for rows, drawn in ((30_000, 7_000), (3000, 20_000)):
        _, counts = zipf(rows, drawn, 1)
        weights = counts / drawn * rand(rows).mul(0.5).exp()
        found, unseen = lookup_weights(weights, counts), counts == 0
        total = found[~unseen].sum() + found[unseen].sum() / UNSEEN_WEIGHT
        assert 0.95 < float(total / weights.sum()) < 1.05


def test_more_look_ups_count_more() -> None:
    counts = torch.arange(60).repeat_interleave(3)
    for weights in (counts / 100, torch.full((180,), 0.5) * (counts > 0)):
        found = lookup_weights(weights, counts)
        seen = found[counts > 0].reshape(-1, 3)[:, 0]
        assert bool((seen.diff() > 0).all())
        assert found[:3].max() < seen[0] * UNSEEN_WEIGHT


@pytest.mark.parametrize("rows", [1, 2, 19, 1000, 1001, 2500])
def test_edges_of_look_ups(rows: int) -> None:
    cases = {
        "all once": torch.ones(rows, dtype=torch.long),
        "none once": 3 * (torch.arange(rows) % 2),
        "all often": torch.full((rows,), 7),
        "none": torch.zeros(rows, dtype=torch.long),
        "the last one once": (torch.arange(rows) == rows - 1).long(),
    }
    for name, counts in cases.items():
        found = lookup_weights(counts / 10, counts)
        assert found.dtype == torch.float32
        assert found.shape == (rows,)
        assert bool(torch.isfinite(found).all()), name
        assert bool((found >= 0).all()), name
        # Measured weights that are just the counts are kept; a single one shares with those around it.
        kept = found[counts > 0] / (counts[counts > 0] / 10)
        if name == "the last one once" and rows > 1:
            assert 0.4999 < float(kept) < 1
        else:
            torch.testing.assert_close(kept, torch.ones_like(kept))
        if name in ("none once", "none"):
            assert not found[counts == 0].any()
    # One single look-up of few rows: the others get at most a twentieth of it each, doubled.
    last = lookup_weights(cases["the last one once"] / 10, cases["the last one once"])
    assert bool((last[:-1] <= UNSEEN_WEIGHT * 0.1 / 20 + 1e-9).all())


def test_look_ups_are_counted_row_by_row() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    found = collect(model, [TOKENS, torch.tensor([[19, 1]])], "embedding", 0).weights
    expected = torch.zeros(20, dtype=torch.long)
    expected[[1, 2, 3, 4, 19]] = torch.tensor([3, 1, 1, 2, 1])
    assert torch.equal(found["0.weight"].counts, expected)
    assert found["0.weight"].positions == 8
    assert found["1.weight"].counts is None
    assert collect(Tied(), [TOKENS], "embedding", 0).weights["table.weight"].counts is None


def test_a_state_weighs_rows_by_their_look_ups() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    statistics = collect(model, [TOKENS], "embedding", 0)
    layer = state_of(model, TOKENS).layers["0.weight"]
    measured = statistics.fisher["0.weight"].sum(1) / 8
    expected = lookup_weights(measured, statistics.weights["0.weight"].counts)
    torch.testing.assert_close(
        layer.metric.row_weights, LOOKUP_WEIGHT * (expected + LOOKUP_SMOOTHING * expected.mean())
    )
    assert layer.row_exponents is not None


# --- batch norm -----------------------------------------------------------------------------------------------


def batch_norm() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)).eval()
    with torch.no_grad():
        for index, tensor in enumerate((*model[1].parameters(), model[1].running_mean)):
            tensor.copy_(rand(3, seed=index) + 0.5)
        model[1].running_var.copy_(rand(3, seed=9).exp())
    return model


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_curvature_of_running_statistics_is_the_squared_derivative(buffer: str) -> None:
    model, x = batch_norm(), rand(6, 2, 4, 4)
    found = batch_norm_curvature(model, collect(model, [x], "embedding", 5).fisher)[f"1.{buffer}"]
    # The direction at the output that seed 5 draws, and central differences along it.
    direction = torch.randn(6, 4, generator=torch.Generator().manual_seed(5)).double()
    model, x, delta = model.double(), x.double(), 1e-5
    tensor, derivatives = getattr(model[1], buffer), []
    for channel in range(3):
        ends = []
        for sign in (1, -1):
            tensor[channel] += sign * delta
            ends.append(float((model(x) * direction).sum().detach()))
            tensor[channel] -= sign * delta
        derivatives.append((ends[0] - ends[1]) / (2 * delta))
    torch.testing.assert_close(found.double(), torch.tensor(derivatives).double().square() / 6, rtol=1e-3, atol=1e-6)


def test_running_statistics_get_their_curvature() -> None:
    model = batch_norm()
    state = state_of(model, rand(6, 2, 4, 4))
    assert set(state.exact) == {"1.num_batches_tracked"}
    for name in ("1.running_mean", "1.running_var"):
        assert state.small[name].curvature.shape == (3,)
        assert (state.small[name].curvature > 0).all()
    assert state_of(model).small["1.running_var"].curvature is None


def test_batch_norm_without_affine_or_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    small = state_of(model, rand(6, 4)).small
    assert small["0.running_mean"].curvature is None
    assert small["1.weight"].curvature is not None


def test_a_bare_batch_norm_has_names_without_a_prefix() -> None:
    model = nn.BatchNorm1d(4).eval()
    assert state_of(model, rand(6, 4)).small["running_var"].curvature is not None
