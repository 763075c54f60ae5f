"""Decoded weights in real modules: dense and on the fly must be one network, and a wrong file must change nothing."""

import copy
import gc
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from factorpack.errors import FormatError, MismatchError, UnsupportedError
from factorpack.factors import Basis, Codes, FactoredVector, FactoredWeight, Grid, OneHotCodes, kernel_of
from factorpack.nn import loading
from factorpack.tiling import Tiling

# --- networks -------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 16, 3, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.transposed = nn.ConvTranspose2d(16, 12, 3, groups=2)
        self.head = nn.Linear(12, 10)
        self.register_buffer("scale", torch.full((1, 4, 1, 1), 0.5), persistent=False)

    def forward(self, images):
        features = functional.relu(self.depthwise(functional.relu(self.norm(self.grouped(images * self.scale)))))
        return self.head(self.transposed(features).mean((2, 3)))


class TiedEmbedding(nn.Module):
    """The embedding is its own output layer twice over: through a module's tie and through a function."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        states = self.mix(self.embedding(tokens))
        return self.head(states) + functional.linear(states, self.embedding.weight)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, states):
        return self.norm(states + self.attention(states, states, states, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 8)
        self.cell = nn.GRUCell(8, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, steps):
        return self.head(self.cell(self.lstm(steps)[0][-1]))


class Encoder(nn.TransformerEncoder):
    """Runs in torch's fused fast path where gradients are off."""

    def __init__(self):
        super().__init__(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(24, 32)


INPUTS = {
    Linear: lambda: torch.randn(3, 24),
    Convolutions: lambda: torch.randn(2, 4, 9, 9),
    TiedEmbedding: lambda: torch.randint(0, 50, (2, 5)),
    Attention: lambda: torch.randn(2, 5, 16),
    Recurrent: lambda: torch.randn(5, 2, 12),
    Encoder: lambda: torch.randn(2, 5, 16),
}
NETWORKS = list(INPUTS)

# --- decoded files --------------------------------------------------------------------------------------------


def grid(low, high, lines):
    return Grid(low, high, np.linspace(-420, -350, lines).astype(np.int32))


def integers(limit, *shape):
    return np.random.default_rng(sum(shape)).integers(-limit, limit + 1, shape).astype(np.int32)


def direct_rows(tiling):
    depth, count = tiling.tiled_shape
    codes = Codes(integers(7, depth, count), grid(-8, 7, 1))
    return FactoredWeight("direct", tiling, Basis(None, grid(0, 0, depth)), codes)


def direct_columns(tiling):
    depth, count = tiling.tiled_shape
    codes = Codes(integers(60, depth, count), grid(-64, 63, count))
    return FactoredWeight("direct", tiling, Basis(None, grid(0, 0, 1)), codes)


def sparse_pca(tiling):
    depth, count = tiling.tiled_shape
    codes = Codes(integers(7, 3, count), grid(-8, 7, 1))
    return FactoredWeight("sparse_pca", tiling, Basis(integers(90, depth, 3), grid(-127, 127, depth)), codes)


def separable(tiling):
    kernel = kernel_of(tiling.shape)
    if not kernel or tiling.transposed:
        return direct_rows(tiling)
    basis = Basis.separable(tuple(integers(9, taps, taps) for taps in kernel), -300)
    tiling = Tiling(tiling.shape, tiling.groups, depth=len(basis.integers))
    return FactoredWeight("separable", tiling, basis, Codes(integers(7, *tiling.tiled_shape), grid(-8, 7, 1)))


def vq(tiling):
    tiling = Tiling(tiling.shape, tiling.groups, tiling.transposed, depth=4)
    depth, count = tiling.tiled_shape
    codes = OneHotCodes(np.abs(integers(4, count)), 5)
    return FactoredWeight("vq", tiling, Basis(integers(90, depth, 5), grid(-127, 127, 1)), codes)


FORMS = [direct_rows, direct_columns, sparse_pca, separable, vq]


def mixed():
    """Another form for each tensor in turn."""
    forms = itertools.cycle(FORMS)

    def form(tiling):
        return next(forms)(tiling)

    return form


def decoded(model, form):
    """What a file made from this model would hold: its matrices in the given form, all else exact or on a grid."""
    tensors, dtypes, aliases, first = {}, {}, {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        module = model.get_submodule(name.rpartition(".")[0])
        if tensor.ndim > 1:
            transposed = isinstance(module, nn.ConvTranspose2d)
            tensors[name] = form(Tiling(tuple(tensor.shape), getattr(module, "groups", 1), transposed))
        elif name.endswith("bias"):
            tensors[name] = FactoredVector(tuple(tensor.shape), integers(30, tensor.numel()), -300, 2, False)
        else:
            tensors[name] = tensor.detach().float().numpy() if tensor.is_floating_point() else tensor.numpy()
    return tensors, dtypes, aliases


def packed_bytes(file):
    """Bytes of the factors as they should lie in memory, and of the small tensors in their dtypes."""
    tensors, dtypes, _ = file
    total = 0
    for name, stored in tensors.items():
        if isinstance(stored, FactoredWeight):
            basis, codes = stored.basis, stored.codes
            total += 4 * basis.grid.exponents.size + (0 if basis.integers is None else basis.integers.size)
            if isinstance(codes, OneHotCodes):
                total += codes.indices.size
            else:
                bits = 4 if codes.grid.high <= 7 else 8
                total += codes.integers.size * bits / 8 + 4 * codes.grid.exponents.size
        else:
            total += np.prod(stored.shape) * getattr(torch, dtypes[name]).itemsize
    return total


def both(network, form):
    file = decoded(network(), form)
    return (
        loading.place_dense(network().eval(), *file),
        loading.place_on_the_fly(network().eval(), *file),
        INPUTS[network](),
    )


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# --- the state dict -------------------------------------------------------------------------------------------


def test_state_dict_has_every_tensor_in_its_dtype():
    file = decoded(Convolutions().bfloat16(), mixed())
    state = loading.state_dict(*file)
    model = Convolutions().bfloat16()
    assert model.load_state_dict(state).missing_keys == []
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    np.testing.assert_array_equal(
        state["grouped.weight"].float().numpy(),
        torch.from_numpy(file[0]["grouped.weight"].tensor()).bfloat16().float().numpy(),
    )
    assert state["norm.num_batches_tracked"].dtype == torch.int64


def test_tied_names_are_one_tensor_object():
    state = loading.state_dict(*decoded(TiedEmbedding(), sparse_pca))
    assert state["head.weight"] is state["embedding.weight"]


def test_read_only_arrays_are_copied():
    array = np.arange(3)
    array.flags.writeable = False
    state = loading.state_dict({"ids": array}, {"ids": "int64"}, {})
    state["ids"].add_(1)
    assert array.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("dtypes", "aliases"),
    [({"a": "float33"}, {}), ({"a": "nn"}, {}), ({}, {}), ({"a": "int64"}, {"b": "c"}), ({"a": "int64"}, {"a": "a"})],
)
def test_unknown_dtypes_and_alias_targets_are_refused(dtypes, aliases):
    with pytest.raises(FormatError, match=r"'a'|'b'"):
        loading.state_dict({"a": np.arange(3)}, dtypes, aliases)


# --- the two modes agree --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_dense_and_on_the_fly_are_one_network(network, form):
    dense, packed, inputs = both(network, form)
    assert torch.equal(dense(inputs), packed(inputs))
    assert len(set(dense(inputs).flatten().tolist())) > 5
    with torch.enable_grad():
        torch.testing.assert_close(dense(inputs), packed(inputs), rtol=1e-5, atol=1e-5)
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        assert torch.equal(getattr(packed.get_submodule(path), attribute), parameter)


@pytest.mark.parametrize("network", NETWORKS)
def test_dense_tensors_are_filled_in_place(network):
    model, file = network(), decoded(network(), mixed())
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert loading.place_dense(model, *file) is model
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    state = loading.state_dict(*file)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_modules_stay_what_they_are():
    _, packed, _ = both(Convolutions, direct_rows)
    assert isinstance(packed.grouped, nn.Conv2d)
    assert type(packed.grouped).forward is nn.Conv2d.forward
    assert packed.grouped.weight.shape == (16, 2, 3, 3)
    assert next(packed.parameters()).dtype == torch.float32
    assert not any(parameter.requires_grad for name, parameter in packed.named_parameters() if "original" in name)


def test_training_mode_runs_and_leaves_gradients_to_the_small_tensors():
    _, packed, inputs = both(Linear, sparse_pca)
    with torch.enable_grad():
        packed.train()(inputs).sum().backward()
    assert packed.bias.grad is not None


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_weights_pass_through_the_dtype_they_were_stored_from(stored, model_dtype):
    file = decoded(Linear().to(stored), sparse_pca)
    dense, packed = (
        place(Linear().to(model_dtype), *file) for place in (loading.place_dense, loading.place_on_the_fly)
    )
    assert dense.weight.dtype == packed.weight.dtype == model_dtype
    assert torch.equal(dense.weight, packed.weight)
    assert torch.equal(dense.weight.to(stored).to(model_dtype), dense.weight)


# --- memory ---------------------------------------------------------------------------------------------------


def live_bytes():
    """Bytes under all tensors that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("network", [Linear, Convolutions, TiedEmbedding, Attention, Encoder])
def test_only_the_factors_stay_in_the_model(network, form):
    file = decoded(network(), form)
    packed, inputs = loading.place_on_the_fly(network().eval(), *file), INPUTS[network]()
    for _ in range(3):
        packed(inputs)
    not_stored = sum(buffer.nbytes for name, buffer in packed.named_buffers() if name == "scale")
    assert loading.resident_bytes(packed) <= 1.05 * packed_bytes(file) + not_stored
    assert loading.resident_bytes(packed) < loading.resident_bytes(network())
    assert loading.kept_dense(packed) == {}


@pytest.mark.parametrize("network", [Convolutions, TiedEmbedding])
def test_forwards_leave_no_tensor_behind(network):
    packed, inputs = loading.place_on_the_fly(network().eval(), *decoded(network(), mixed())), INPUTS[network]()
    before = live_bytes()
    for _ in range(3):
        packed(inputs)
    assert live_bytes() == before


def test_shared_storages_are_counted_once():
    model = TiedEmbedding()
    assert loading.resident_bytes(model) == 4 * (50 * 16 + 16 * 16 + 16)
    model.register_buffer("view", model.mix.weight.detach()[:8])
    assert loading.resident_bytes(model) == 4 * (50 * 16 + 16 * 16 + 16)


def test_ties_stay_ties():
    dense, packed, tokens = both(TiedEmbedding, direct_rows)
    assert dense.head.weight is dense.embedding.weight
    assert packed.head.parametrizations.weight[0] is packed.embedding.parametrizations.weight[0]
    clone = copy.deepcopy(packed)
    clone.embedding.parametrizations.weight[0].codes.zero_()
    assert not clone.head.weight.any()
    assert packed.head.weight.any()
    assert not clone(tokens).any()


def test_a_tie_of_the_file_alone_is_packed_once():
    class Untied(TiedEmbedding):
        def __init__(self):
            super().__init__()
            self.head.weight = nn.Parameter(torch.zeros(50, 16))

    file = decoded(TiedEmbedding(), sparse_pca)
    dense, packed = loading.place_dense(Untied(), *file), loading.place_on_the_fly(Untied(), *file)
    tokens = INPUTS[TiedEmbedding]()
    assert torch.equal(dense(tokens), packed(tokens))
    assert loading.resident_bytes(packed) <= packed_bytes(file)


def test_a_tie_of_the_model_alone_needs_equal_values():
    tensors, dtypes, _ = decoded(TiedEmbedding(), sparse_pca)
    twice = tensors | {"head.weight": sparse_pca(Tiling((50, 16)))}
    dtypes["head.weight"] = "float32"
    model = TiedEmbedding()
    model.head.weight = nn.Parameter(model.embedding.weight.detach())
    packed = loading.place_on_the_fly(model, twice, dtypes, {})
    assert packed.head.parametrizations.weight[0] is packed.embedding.parametrizations.weight[0]
    twice["head.weight"] = direct_rows(Tiling((50, 16)))
    for place in (loading.place_dense, loading.place_on_the_fly):
        with pytest.raises(MismatchError, match=r"'embedding\.weight' and 'head\.weight' are one tensor in the model"):
            place(TiedEmbedding(), twice, dtypes, {})


# --- what users do with a model afterwards --------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_a_deep_copy_is_the_same_network(network):
    _, packed, inputs = both(network, mixed())
    clone = copy.deepcopy(packed)
    assert torch.equal(clone(inputs), packed(inputs))
    assert loading.resident_bytes(clone) == loading.resident_bytes(packed)
    assert loading.kept_dense(clone) == loading.kept_dense(packed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", NETWORKS)
def test_conversions_act_as_on_a_dense_model(network, dtype):
    dense, packed, inputs = both(network, mixed())
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    outputs = packed.to(dtype)(inputs)
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, dense.to(dtype)(inputs), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_state_dict_goes_into_another_model_of_the_same_mode(network):
    dense, packed, inputs = both(network, mixed())
    expected = dense(inputs)
    for model in (dense, packed):
        other = copy.deepcopy(model)
        for tensor in other.state_dict().values():
            tensor.zero_()
        assert other.load_state_dict(model.state_dict()).unexpected_keys == []
        assert torch.equal(other(inputs), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("network", NETWORKS)
def test_compiled_models_give_the_same_outputs(network, backend):
    _, packed, inputs = both(network, mixed())
    torch._dynamo.reset()
    compiled = torch.compile(packed, backend=backend, fullgraph=network is not Recurrent)
    torch.testing.assert_close(compiled(inputs), packed(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights:UserWarning")
@pytest.mark.parametrize("network", NETWORKS)
def test_exported_models_give_the_same_outputs(network):
    _, packed, inputs = both(network, mixed())
    exported = torch.export.export(packed, (inputs,))
    torch.testing.assert_close(exported.module()(inputs), packed(inputs), rtol=1e-5, atol=1e-5)


def test_autocast_does_not_touch_the_integer_product():
    dense, packed, inputs = both(Linear, sparse_pca)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed.weight, dense.weight)
        assert torch.equal(packed(inputs), dense(inputs))


def test_assigning_to_a_packed_weight_is_refused():
    _, packed, _ = both(Linear, sparse_pca)
    with pytest.raises(UnsupportedError, match="cannot be assigned"):
        packed.weight = torch.zeros(32, 24)


# --- what cannot be packed ------------------------------------------------------------------------------------


class Bare(nn.Module):
    """One matrix, held in a way that the subclasses choose."""

    def matrix(self):
        return self.weight

    def forward(self, inputs):
        return functional.linear(inputs, self.matrix())


class Buffered(Bare):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(32, 24))


class Viewed(Bare):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 24))
        self.register_buffer("view", self.weight.detach()[:], persistent=False)

    def matrix(self):
        return self.view


class Listed(Bare):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 24))
        self.cache = {"all": [self.weight]}
        self.cache["self"] = self.cache

    def matrix(self):
        return self.cache["all"][0]


class Named(Bare):
    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(32, 24))

    def matrix(self):
        return self.keys


class Forwarding(Bare):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 24))

    def __getattr__(self, name):
        return super().__getattr__(name)


class Normed(Bare):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, 24))
        parametrizations.weight_norm(self)


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (Buffered, "buffer"),
        (Viewed, "buffer or a plain attribute"),
        (Listed, "plain attribute"),
        (Named, "'keys'"),
        (Forwarding, "class of its module"),
        (Normed, "parametrised already"),
    ],
)
def test_what_cannot_be_packed_stays_dense_and_says_why(network, why):
    file = decoded(network(), direct_columns)
    dense, packed = loading.place_dense(network(), *file), loading.place_on_the_fly(network(), *file)
    reasons = loading.kept_dense(packed)
    assert set(reasons) == {name for name, stored in file[0].items() if isinstance(stored, FactoredWeight)}
    assert all(why in reason for reason in reasons.values())
    inputs = torch.randn(3, 24)
    assert torch.equal(dense(inputs), packed(inputs))
    assert packed(inputs).any()


def test_recurrent_layers_stay_dense_and_cells_do_not():
    _, packed, _ = both(Recurrent, direct_rows)
    assert set(loading.kept_dense(packed)) == {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    assert parametrize.is_parametrized(packed.cell, "weight_ih")
    assert packed.lstm._flat_weights[0] is packed.lstm.weight_ih_l0


def test_factors_larger_than_the_tensor_stay_dense():
    tiling = Tiling((24, 24))
    basis = Basis(integers(90, 24, 24), grid(-9000, 9000, 24))
    weight = FactoredWeight("svd", tiling, basis, Codes(integers(90, 24, 24), grid(-9000, 9000, 24)))
    packed = loading.place_on_the_fly(nn.Linear(24, 24, bias=False), {"weight": weight}, {"weight": "float32"}, {})
    assert "2496 bytes" in loading.kept_dense(packed)["weight"]
    assert np.array_equal(packed.weight.numpy(), weight.tensor())


@pytest.mark.parametrize(
    "container",
    [
        lambda: nn.ParameterList([nn.Parameter(torch.zeros(32, 24))]),
        lambda: nn.ParameterDict({"0": nn.Parameter(torch.zeros(32, 24))}),
    ],
)
def test_containers_of_parameters_are_packed(container):
    model = container()
    file = decoded(model, direct_rows)
    loading.place_on_the_fly(model, *file)
    key = 0 if isinstance(model, nn.ParameterList) else "0"
    assert np.array_equal(model[key].numpy(), file[0]["0"].tensor())
    assert loading.kept_dense(model) == {}


# --- a file for another model ---------------------------------------------------------------------------------

PLACES = [loading.place_dense, loading.place_on_the_fly]


def unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("place", PLACES)
def test_a_mismatch_names_the_tensors_and_changes_nothing(place):
    tensors, dtypes, aliases = decoded(Convolutions(), direct_rows)
    del tensors["norm.weight"]
    tensors["head.weight"] = direct_rows(Tiling((10, 13)))
    tensors["more.weight"] = direct_rows(Tiling((2, 2)))
    tensors["norm.num_batches_tracked"] = np.float32(3)[None].reshape(())
    dtypes |= {"more.weight": "float32", "norm.num_batches_tracked": "float32"}
    model = Convolutions()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MismatchError) as error:
        place(model, tensors, dtypes, aliases)
    message = str(error.value)
    assert "'norm.weight' (16,) of the model is not in the file" in message
    assert "'more.weight' (2, 2) of the file is not in the model" in message
    assert "'head.weight' is (10, 12) in the model and (10, 13) in the file" in message
    assert "'norm.num_batches_tracked' is torch.int64 in the model and torch.float32 in the file" in message
    assert "another model" in message
    assert "Build the model that the file was made from" in message
    assert unchanged(model, before)


@pytest.mark.parametrize("place", PLACES)
def test_only_the_first_differences_are_named(place):
    with pytest.raises(MismatchError, match=r"'0\.weight'.*; and 15 more") as error:
        place(nn.Sequential(*(nn.Linear(2, 2) for _ in range(10))), {}, {}, {})
    assert "9.weight" not in str(error.value)


@pytest.mark.parametrize("place", PLACES)
def test_models_without_values_are_refused(place):
    file = decoded(Linear(), direct_rows)
    with torch.device("meta"):
        on_meta = Linear()
    for model in (on_meta, nn.LazyLinear(32)):
        with pytest.raises(UnsupportedError, match="no values"):
            place(model, *file)


@pytest.mark.parametrize("place", PLACES)
def test_a_model_is_packed_once(place):
    file = decoded(Linear(), direct_rows)
    model = loading.place_on_the_fly(Linear(), *file)
    with pytest.raises(UnsupportedError, match="build it anew"):
        place(model, *file)


@pytest.mark.parametrize("place", PLACES)
def test_extra_state_is_no_tensor_that_could_be_missing(place):
    class Stateful(Linear):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            raise AssertionError(state)

    file = decoded(Linear(), direct_rows)
    assert np.array_equal(place(Stateful(), *file).weight.numpy(), file[0]["weight"].tensor())
