"""A compressed network in training: it computes what its file would, and gradients are those of the estimators."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from laws import assert_same_contents, assert_same_weight, weights
from torch import Tensor, nn
from torch.nn import functional as F

from factorpack.coding.records import price_codes
from factorpack.coding.streams import plan_integers
from factorpack.container import Contents
from factorpack.errors import MismatchError
from factorpack.factors import IDENTITY_GRID, Basis, Codes, FactoredVector, FactoredWeight, Grid, OneHotCodes
from factorpack.nn.loading import place_dense
from factorpack.nn.trainable import TrainableModel, TrainableVector, TrainableWeight
from factorpack.tiling import Tiling

RADIUS = 40
pricer = partial(price_codes, radius=RADIUS)
WEIGHTS = dict(weights(0))


def vector(rng: np.random.Generator, logarithmic: bool, size: int = 9) -> FactoredVector:
    return FactoredVector(
        (size,), rng.integers(-20, 20, size).astype(np.int32), 3 if logarithmic else -300, 5, logarithmic
    )


# --- as it comes out of the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_before_training_the_factors_are_those_of_the_file(name: str) -> None:
    latent = TrainableWeight(WEIGHTS[name])
    assert_same_weight(latent.factored(), WEIGHTS[name])
    expected = torch.from_numpy(WEIGHTS[name].tensor())
    torch.testing.assert_close(latent().detach(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("logarithmic", [False, True])
def test_before_training_small_tensors_are_those_of_the_file(logarithmic: bool) -> None:
    first = vector(np.random.default_rng(0), logarithmic)
    latent = TrainableVector(first)
    found = latent.factored()
    np.testing.assert_array_equal(found.integers, first.integers)
    np.testing.assert_array_equal(found.tensor(), first.tensor())
    torch.testing.assert_close(latent().detach(), torch.from_numpy(first.tensor()))


def moved(module: nn.Module, by: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", WEIGHTS)
def test_in_training_it_computes_what_its_factors_are(name: str) -> None:
    latent = TrainableWeight(WEIGHTS[name])
    moved(latent, 1.0)
    found = latent.factored()
    expected = torch.from_numpy(found.tensor())
    assert not np.array_equal(found.tensor(), WEIGHTS[name].tensor()) or expected.numel() < 10
    torch.testing.assert_close(latent().detach(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("logarithmic", [False, True])
def test_small_tensors_in_training_are_what_their_factors_are(logarithmic: bool) -> None:
    latent = TrainableVector(vector(np.random.default_rng(0), logarithmic))
    moved(latent, 3.0)
    torch.testing.assert_close(latent().detach(), torch.from_numpy(latent.factored().tensor()))


@pytest.mark.parametrize("name", WEIGHTS)
def test_at_rest_latents_are_in_the_middle_of_what_they_stand_for(name: str) -> None:
    latent = TrainableWeight(WEIGHTS[name])
    moved(latent, 1.0)
    with torch.no_grad():
        before, factors = latent(), latent.factored()
        latent.rest()
        torch.testing.assert_close(latent(), before)
    assert_same_weight(latent.factored(), factors)
    for sign in (-1, 1):
        latent.rest()
        with torch.no_grad():
            unit = torch.exp2(latent.octaves)
            for parameter in latent.basis:
                parameter.add_(sign * 0.49 * (unit if latent.codes is None else 1.0))
            if latent.codes is not None:
                latent.codes.add_(sign * 0.49 * unit)
        assert_same_weight(latent.factored(), factors)


def test_at_rest_small_tensors_are_in_the_middle_too() -> None:
    latent = TrainableVector(vector(np.random.default_rng(0), True))
    moved(latent, 3.0)
    found = latent.factored()
    latent.rest()
    with torch.no_grad():
        latent.levels.add_(0.49)
    np.testing.assert_array_equal(latent.factored().integers, found.integers)


def test_codes_near_zero_can_be_left_out() -> None:
    latent = TrainableWeight(WEIGHTS[next(name for name in WEIGHTS if name.startswith("direct; embedding;"))])
    with torch.no_grad():
        latent.codes.copy_(torch.linspace(-3, 3, latent.codes.numel()).reshape(latent.codes.shape))
    kept, fewer = (latent.factored(threshold).codes.integers for threshold in (0.5, 0.8))
    left_out = (latent.codes.abs() >= 0.5) & (latent.codes.abs() < 0.8)
    assert left_out.any()
    np.testing.assert_array_equal(fewer, np.where(left_out.numpy(), 0, kept))


# --- gradients ------------------------------------------------------------------------------------------------------


def through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("octaves", [0.0, 0.37, -1.2])
@pytest.mark.parametrize("name", ["direct; linear;", "sparse_pca; conv2d;", "separable; conv2d, taps;", "vq; linear;"])
def test_gradients_are_those_of_the_straight_through_estimator(name: str, octaves: float) -> None:
    """Against the formula written out, in float64."""
    weight = next(weight for label, weight in WEIGHTS.items() if label.startswith(name))
    latent = TrainableWeight(weight)
    moved(latent, 0.7)
    with torch.no_grad():
        latent.octaves.fill_(octaves)
    slopes = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (latent() * slopes).sum().backward()

    one_hot = isinstance(weight.codes, OneHotCodes)
    scaled = latent.basis[0] if one_hot else latent.codes
    u, o = scaled.detach().double().requires_grad_(), torch.tensor(octaves, dtype=torch.float64, requires_grad=True)
    factors = [factor.detach().double().requires_grad_() for factor in ([] if one_hot else latent.basis)]
    unit = 2 ** (through(64 * o) / 64)
    tiles = through(u / unit) * unit
    if one_hot:
        tiles = tiles[:, torch.from_numpy(weight.codes.indices.astype(np.int64))]
    elif factors:
        basis = through(factors[0])
        for factor in factors[1:]:
            basis = torch.kron(basis, through(factor))
        tiles = basis @ tiles
    rows = torch.from_numpy(weight.basis.grid.steps)[:, None]
    columns = torch.ones(1) if one_hot else torch.from_numpy(weight.codes.grid.steps)
    tiles = tiles * rows * columns
    tiled = torch.from_numpy(weight.tiling.tile(slopes.numpy()))
    (tiles * tiled).sum().backward()
    scale = float(u.grad.abs().max())
    torch.testing.assert_close(scaled.grad.double(), u.grad, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(latent.octaves.grad.double(), o.grad, rtol=1e-3, atol=1e-4 * scale)
    for found, expected in zip([] if one_hot else latent.basis, factors, strict=True):
        torch.testing.assert_close(
            found.grad.double(), expected.grad, rtol=1e-4, atol=1e-4 * float(expected.grad.abs().max())
        )


# --- bits -----------------------------------------------------------------------------------------------------------


def streamed(weight: FactoredWeight) -> np.ndarray:
    codes = weight.codes.integers
    return codes.T.reshape(weight.shape[0], -1) if weight.basis.factors else codes


@pytest.mark.parametrize("name", [name for name in WEIGHTS if not name.startswith("vq")])
def test_bits_at_integers_are_those_of_the_coder(name: str) -> None:
    latent = TrainableWeight(WEIGHTS[name])
    latent.reprice(pricer)
    plan = plan_integers(np.ascontiguousarray(streamed(WEIGHTS[name])))
    # Escapes are written as whole bytes, which no single integer pays for.
    assert -1e-3 <= plan.bits.payload + plan.bits.escapes - float(latent.bits().detach()) < 8 + 16


def test_bits_turn_with_the_prices() -> None:
    """Their slope is the difference of the prices on both sides, and moving a step moves all of its codes."""
    weight = next(weight for label, weight in WEIGHTS.items() if label.startswith("direct; embedding;"))
    latent = TrainableWeight(weight)
    latent.reprice(pricer)
    moved(latent, 0.3)
    bits, contexts, total = pricer(weight)
    latent.reprice(lambda _: (bits, contexts, total))
    latent.bits().backward()
    unit = 2 ** (round(64 * latent.octaves.item()) / 64)
    t = latent.codes.detach().numpy() / unit
    below = np.floor(t).astype(int)
    slope = (bits[contexts, below + RADIUS + 1] - bits[contexts, below + RADIUS]) / unit
    np.testing.assert_allclose(latent.codes.grad.numpy(), slope, rtol=1e-5)
    expected = -math.log(2) * float((slope * t * unit).sum())
    np.testing.assert_allclose(latent.octaves.grad.item(), expected, rtol=1e-4)


def test_codes_beyond_the_prices_pay_the_outermost() -> None:
    latent = TrainableWeight(
        next(weight for label, weight in WEIGHTS.items() if label.startswith("direct; embedding;"))
    )
    prices = np.abs(np.arange(-2, 3)).astype(np.float32)[None]
    latent.reprice(lambda weight: (prices, np.zeros(weight.codes.shape, np.uint8), 0.0))
    with torch.no_grad():
        latent.codes.zero_()
        latent.codes[0, 0], latent.codes[1, 0], latent.codes[2, 0] = 100, -1.5, 2
    assert float(latent.bits().detach()) == 2 + 1.5 + 2


@pytest.mark.parametrize("name", ["direct; linear;", "sparse_pca; conv2d;", "separable; conv2d, taps;", "svd; linear;"])
def test_a_price_is_the_gradient_of_bits_where_training_reached(name: str) -> None:
    weight = next(weight for label, weight in WEIGHTS.items() if label.startswith(name))
    one, other = TrainableWeight(weight), TrainableWeight(weight)
    for latent in (one, other):
        latent.reprice(pricer)
        moved(latent, 0.3)
        latent.take_slopes()
    (0.7 * one.bits()).backward()
    reached = torch.rand(other.codes.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    other.codes.grad = 1e-20 * reached
    other.octaves.grad = torch.zeros(())
    other.price(0.7)
    torch.testing.assert_close(other.codes.grad, torch.where(reached, one.codes.grad, 0.0), rtol=1e-5, atol=1e-6)
    slopes = other.codes.grad / 0.7
    wanted = -math.log(2) * 0.7 * (slopes * other.codes.detach()).sum()
    torch.testing.assert_close(other.octaves.grad, wanted, rtol=1e-4, atol=1e-4)


def test_what_the_coder_took_is_kept_with_the_prices() -> None:
    weight = next(weight for label, weight in WEIGHTS.items() if label.startswith("direct; embedding;"))
    latent = TrainableWeight(weight)
    latent.reprice(pricer)
    assert latent.coded_bits == plan_integers(weight.codes.integers).bits.total


@pytest.mark.parametrize("name", ["direct; linear;", "sparse_pca; conv2d;", "separable; conv2d, taps;"])
def test_a_recount_has_the_prices_of_before_for_the_codes_of_now(name: str) -> None:
    weight = next(weight for label, weight in WEIGHTS.items() if label.startswith(name))
    latent = TrainableWeight(weight)
    latent.reprice(pricer)
    fitted = latent.coded_bits
    latent.recount()
    assert latent.coded_bits == pytest.approx(fitted, abs=1e-6)
    bits, contexts, _ = pricer(weight)
    drawn = np.random.default_rng(0).random(latent.codes.shape) < 0.1
    with torch.no_grad():
        latent.codes.copy_(torch.where(torch.from_numpy(drawn), 0.0, latent.codes))
    before = weight.codes.integers.clip(-RADIUS, RADIUS)
    saved = (bits[contexts, before + RADIUS] - bits[contexts, RADIUS])[drawn].sum(dtype=np.float64)
    latent.recount()
    assert latent.coded_bits == pytest.approx(fitted - saved, rel=1e-5)
    recounted = latent.coded_bits
    latent.reprice(pricer)
    assert latent.coded_bits == pytest.approx(recounted, rel=0.05)


# --- a network ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A look-up that is the output layer too, a norm, a buffer, and a layer that is stored exactly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.mix(self.table(tokens)))))


def contents_of(model: nn.Module) -> Contents:
    """Every weight on a grid, by hand."""
    tensors, dtypes, aliases = {}, {}, {}
    for name, tensor in model.state_dict().items():
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        if name == "head.weight":
            aliases[name] = "table.weight"
        elif name in ("mix.weight", "table.weight"):
            step = np.float32(2.0**-4)
            integers = np.rint(tensor.numpy() / step).astype(np.int32)
            codes = Codes(integers, Grid.holding(integers, np.array([-256], np.int32)))
            tensors[name] = FactoredWeight("direct", Tiling(tuple(tensor.shape)), Basis(None, IDENTITY_GRID), codes)
        elif name in ("mix.bias", "norm.weight"):
            integers = np.rint(tensor.numpy().reshape(-1) * 64).astype(np.int32)
            tensors[name] = FactoredVector(tuple(tensor.shape), integers, -384, 0, False)
        else:
            tensors[name] = tensor.numpy()
    return Contents(tensors, dtypes, aliases)


def network() -> tuple[TrainableModel, Contents]:
    contents = contents_of(Tied())
    return TrainableModel(Tied(), contents.tensors, contents.dtypes, contents.aliases, pricer), contents


TOKENS = torch.arange(20)


def loaded(model: TrainableModel) -> nn.Module:
    return place_dense(Tied(), model.factored(), model.dtypes, model.aliases).eval()


def test_a_network_computes_what_its_file_does() -> None:
    model, contents = network()
    assert_same_contents(Contents(model.factored(), model.dtypes, model.aliases), contents)
    model.train()
    torch.testing.assert_close(model(TOKENS), loaded(model)(TOKENS))
    moved(model.latents, 0.8)
    torch.testing.assert_close(model(TOKENS), loaded(model)(TOKENS))
    assert not model.network.training


def test_what_is_tied_is_trained_as_one() -> None:
    model, _ = network()
    assert set(model.trained()) == {"table.weight", "mix.weight", "mix.bias", "norm.weight"}
    model(TOKENS).square().sum().backward()
    latent = model.trained()["table.weight"]
    original = Tied().eval()
    original.load_state_dict(loaded(model).state_dict())
    original(TOKENS).square().sum().backward()
    torch.testing.assert_close(latent.codes.grad, original.table.weight.grad * 2.0**-4, rtol=1e-4, atol=1e-4)


def test_parameters_are_the_latents_alone() -> None:
    model, _ = network()
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in model.latents.parameters()}


def trained(rate: float) -> tuple[float, float, float]:
    """Loss of the file before, loss and bits of the file after some training with bits at that price."""
    model, _ = network()
    with torch.no_grad():
        teacher = Tied().eval()(TOKENS)

    def loss() -> float:
        with torch.no_grad():
            return F.mse_loss(loaded(model)(TOKENS), teacher).item()

    before = loss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(200):
        if step % 20 == 0:
            model.reprice()
        optimizer.zero_grad()
        (F.mse_loss(model(TOKENS), teacher) + rate * model.bits()).backward()
        optimizer.step()
    model.reprice()
    return before, loss(), model.bits().item()


def test_training_lowers_the_loss_and_a_price_the_bits() -> None:
    before, after, bits = trained(0.0)
    assert after < 0.2 * before
    _, priced, fewer = trained(3e-5)
    assert priced < before
    assert fewer < 0.9 * bits


def test_another_network_is_refused() -> None:
    contents = contents_of(Tied())
    with pytest.raises(MismatchError, match="another model"):
        TrainableModel(nn.Linear(3, 3), contents.tensors, contents.dtypes, contents.aliases, pricer)


# --- tables ---------------------------------------------------------------------------------------------------------


TABLES = [name for name in WEIGHTS if name.startswith("direct; embedding;") or "; linear along inputs;" in name]


@pytest.mark.parametrize("name", [name for name in TABLES if not name.startswith("vq")])
def test_rows_are_those_of_the_whole_table(name: str) -> None:
    weight = WEIGHTS[name]
    if weight.tiling.depth:
        # A tile becomes a row.
        count = weight.codes.shape[1]
        weight = replace(weight, tiling=Tiling((count, weight.tiling.depth), depth=weight.tiling.depth))
    latent = TrainableWeight(weight)
    moved(latent, 0.7)
    assert latent.row_by_row
    rows = torch.tensor([3, 0, 5])
    torch.testing.assert_close(latent.rows_at(rows), latent()[rows])


class Table(nn.Module):
    """A table that is looked up, with a row of padding, and maybe multiplied with too."""

    def __init__(self, multiplied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8, padding_idx=0)
        self.multiplied = multiplied

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.table(tokens)
        return found @ self.table.weight.T if self.multiplied else found.square()


@pytest.mark.parametrize("multiplied", [False, True])
def test_a_table_gets_the_gradients_that_it_would_get_as_a_whole(multiplied: bool) -> None:
    original = Table(multiplied)
    step = np.float32(2.0**-4)
    integers = np.rint(original.table.weight.detach().numpy() / step).astype(np.int32)
    codes = Codes(integers, Grid.holding(integers, np.array([-256], np.int32)))
    weight = FactoredWeight("direct", Tiling(integers.shape), Basis(None, IDENTITY_GRID), codes)
    model = TrainableModel(Table(multiplied), {"table.weight": weight}, {"table.weight": "float32"}, {}, pricer)
    tokens = torch.tensor([[0, 3, 3, 7], [19, 0, 0, 1]])
    found = model(tokens)
    found.square().sum().backward()
    with torch.no_grad():
        original.table.weight.copy_(torch.from_numpy(weight.tensor()))
    wanted = original(tokens)
    wanted.square().sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        model.trained()["table.weight"].codes.grad, float(step) * original.table.weight.grad, rtol=1e-4, atol=1e-5
    )
