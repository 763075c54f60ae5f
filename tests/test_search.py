"""The search: the size that is asked for, from a state that no model stands behind."""

import numpy as np
import pytest
import torch

from factorpack.container import read, write
from factorpack.errors import BudgetError, UnsupportedError
from factorpack.nn.state import SmallTensor, State
from factorpack.search import Options, Packed, pack
from factorpack.solve.layer import Layer
from factorpack.solve.objective import Metric
from factorpack.tiling import Tiling

SHAPES = {"first": (24, 1, 3, 3), "second": (32, 24, 3, 3), "table": (120, 12), "last": (10, 96)}
SIZES = (3001, 3500, 4500, 6001, 9000, 11_000)


def silent(_stage: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def state() -> State:
    """Four weights, as different as a network's, a small tensor and an integer."""
    rng = np.random.default_rng(0)
    layers, small = {}, {}
    for place, (name, shape) in enumerate(SHAPES.items()):
        tiling = Tiling(shape)
        outputs, inputs = tiling.matrix_shape
        tensor = (rng.standard_normal(shape) * 10.0**-place).astype(np.float32)
        samples = torch.from_numpy(rng.standard_normal((3 * inputs, inputs)).astype(np.float32))
        samples[:, ::2] *= 0.2
        rows = torch.from_numpy(rng.uniform(0.5, 2, outputs).astype(np.float32)) * 10.0**place
        looked_up = name == "table"
        metric = Metric(None if looked_up else (samples.T @ samples / len(samples))[None], rows)
        layers[name] = Layer(name, tensor, tiling, metric, looked_up)
    small["bias"] = SmallTensor(rng.standard_normal(10).astype(np.float32), np.ones(10, np.float32))
    exact = {"count": np.array([12345], np.int64)}
    dtypes = dict.fromkeys([*SHAPES, "bias"], "float32") | {"count": "int64"}
    return State(layers, small, exact, {}, dtypes, ())


@pytest.fixture(scope="module")
def files(state) -> list[Packed]:
    return [pack(state, size, Options(), silent) for size in SIZES]


def loss(packed: Packed) -> float:
    return sum(layer.loss for layer in packed.plan.layers.values())


def test_the_budget_is_kept_and_used(files):
    for size, packed in zip(SIZES, files, strict=True):
        assert 0.99 * size <= len(packed.data) <= size, f"{len(packed.data)} bytes of {size}"


@pytest.mark.parametrize("form", ["direct", "sparse_pca", "svd", "vq", "separable"])
def test_the_budget_is_kept_in_every_form(state, form):
    assert len(pack(state, 4001, Options(form), silent).data) <= 4001


def test_kernels_of_several_taps_are_separable_where_that_is_asked_for(state):
    packed = pack(state, 4001, Options("separable"), silent)
    assert {name: layer.form for name, layer in packed.plan.layers.items()} == {
        "first": "separable", "second": "separable", "table": "direct", "last": "direct",
    }  # fmt: skip
    assert packed.plan.layers["second"].depth == packed.plan.layers["second"].rank == 9


def test_auto_takes_smooth_kernels_separable_and_loses_less():
    rng = np.random.default_rng(0)
    # Each kernel is near a plane: of the nine coefficients of a basis over the taps six are small.
    tensor = rng.standard_normal((32, 24, 3, 3)).cumsum(2).cumsum(3).astype(np.float32)
    layers = {"kernel": Layer("kernel", tensor, Tiling(tensor.shape), Metric(), False)}
    smooth = State(layers, {}, {}, {}, {"kernel": "float32"}, ())
    found = {form: pack(smooth, 2500, Options(form), silent) for form in ("auto", "direct", "separable")}
    assert found["auto"].plan.layers["kernel"].form == "separable"
    assert loss(found["auto"]) <= loss(found["separable"]) < 0.8 * loss(found["direct"])


def test_more_bytes_never_lose_more(files):
    losses = [loss(packed) for packed in files]
    assert all(more <= 1.02 * fewer for fewer, more in zip(losses, losses[1:], strict=False)), losses
    assert losses[-1] < 0.1 * losses[0]


def test_the_plan_says_what_is_in_the_file(state, files, tmp_path):
    packed = files[0]
    write(tmp_path / "model.fpk", packed.data)
    contents, bill = read(tmp_path / "model.fpk")
    assert packed.plan.size_bytes == bill.size_bytes == len(packed.data)
    assert list(packed.plan.layers) == list(SHAPES)
    for weight in bill.weights:
        planned = packed.plan.layers[weight.name]
        assert planned.form == weight.form
        # The coder's tables say the bits; whole words of the coder are what is left to chance.
        assert weight.size_bytes - weight.parts["checksums"] == pytest.approx(planned.size_bytes, abs=8, rel=0.02)
        assert planned.loss == pytest.approx(state.layers[weight.name].loss(contents.tensors[weight.name]), rel=1e-5)
    assert contents.tensors["count"].tolist() == [12345]


def test_equal_questions_get_equal_bytes(state, files):
    assert pack(state, SIZES[2], Options(), silent).data == files[2].data


@pytest.mark.parametrize("form", ["auto", "sparse_pca", "svd", "vq", "separable"])
def test_a_size_that_cannot_be_met_is_told_with_one_that_can(state, form):
    with pytest.raises(BudgetError, match=r"0 bytes cannot be met: the smallest file .* [\d,]+ bytes") as caught:
        pack(state, 0, Options(form), silent)
    smallest = int(str(caught.value).split(" takes ")[1].split()[0].replace(",", ""))
    assert len(pack(state, smallest, Options(form), silent).data) <= smallest


def test_a_budget_beyond_all_need_is_no_fault(state):
    assert len(pack(state, 10**7, Options(), silent).data) < 100_000


def test_a_state_without_weights_is_packed(state):
    bare = State({}, state.small, state.exact, {}, {"bias": "float32", "count": "int64"}, ())
    assert len(pack(bare, 2000, Options(), silent).data) < 500


@pytest.mark.parametrize("options", [Options(), Options("vq")], ids=["auto", "vq"])
def test_progress_is_told_of_stages(state, options):
    calls = []
    pack(state, 5000, options, lambda *call: calls.append(call))
    assert {stage for stage, _, _ in calls} == (
        {"rounding"} if options.form == "auto" else {"rounding", "vq, sequential"}
    )
    assert all(0 <= done <= total == len(SHAPES) for _, done, total in calls)
    for stage in {stage for stage, _, _ in calls}:
        counts = [done for named, done, _ in calls if named == stage]
        assert counts[: len(SHAPES) + 1] == list(range(len(SHAPES) + 1))
        assert counts[-1] == len(SHAPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "wavelet"}, "'wavelet' is no form: choose auto, direct"),
        ({"solver": "magic"}, "'magic' is no solver: choose sequential or projected-gradient"),
        ({"solver": "projected-gradient"}, "projected gradients need a form"),
        ({"form": "separable", "solver": "projected-gradient"}, "choose --form direct, sparse_pca, svd, vq$"),
    ],
)
def test_options_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(UnsupportedError, match=message):
        Options(**arguments)
