"""What no network should be, and some are: each comes back right from a file, or is refused with what to do."""

import re
from textwrap import dedent

import pytest
import torch
from test_cli import assert_one_line, run
from torch import nn
from torch.nn import functional as F

import factorpack
from factorpack import BudgetError, Options, TaskError, UnsupportedError


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module):
    """The module with weights of its own: the same ones in each test."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def network():
    """Two layers, 282 parameters."""
    return filled(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 10)))


BATCHES = [rand(32, 12, seed=seed) for seed in (1, 2)]
SIX_BITS = 400
"""Of `network`, header and names included."""
ROUNDED = 0.25
"""Relative errors at six bits and a little less stay below that; those of weights that are lost are one."""


class Beside(nn.Module):
    """`network`, and tensors that it makes no use of."""

    def __init__(self, parameters=None, buffers=None):
        super().__init__()
        self.network = network()
        for name, values in (parameters or {}).items():
            self.register_parameter(name, nn.Parameter(values))
        for name, values in (buffers or {}).items():
            self.register_buffer(name, values)

    def forward(self, x):
        return self.network(x)


@pytest.fixture
def packed(tmp_path):
    """Compresses a model to a file of at most `size` bytes; the tensors of the file, and the report."""

    def compressed(model, size, batches=None, options=None):
        found = factorpack.compress(model, size, batches, options=options)
        found.save(tmp_path / "model.fpk")
        assert (tmp_path / "model.fpk").stat().st_size == found.report.size_bytes <= size
        tensors, expected = factorpack.load_state_dict(tmp_path / "model.fpk"), model.state_dict()
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        return tensors, found.report

    return compressed


def assert_close(found, expected, most):
    """Relative errors of all tensors, in the sum of squares, are at most `most`."""
    for name, tensor in found.items():
        original = expected[name].detach().cpu().double()
        error = float((tensor.double() - original).norm())
        assert error <= most * float(original.norm()), (name, error / float(original.norm()))


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_kept_exactly(value, packed):
    model = network()
    with torch.no_grad():
        model[0].weight[3, 4] = value
        model[2].bias[:] = value
    tensors, report = packed(model, 1200)
    for name in ("0.weight", "2.bias"):
        assert torch.equal(tensors[name].nan_to_num(7), model.state_dict()[name].nan_to_num(7))
        assert name not in report.plan.layers
    assert_close({name: tensors[name] for name in ("0.bias", "2.weight")}, model.state_dict(), 1e-3)


@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_calibration_of_a_network_that_is_broken_names_the_tensor(name):
    model = network()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = torch.nan
    message = rf"batch 1: the network's output is not finite; '{name}' holds NaN .*: mend it, or compress without"
    with pytest.raises(TaskError, match=message):
        factorpack.compress(model, SIX_BITS, BATCHES)


def test_a_broken_weight_that_is_never_used_does_no_harm(packed):
    model = Beside({"idle": torch.full((9, 9), torch.nan)}, {"mask": torch.full((6, 6), -torch.inf).triu(1)})
    tensors, _ = packed(model, 460, BATCHES)
    assert tensors["idle"].isnan().all()
    assert torch.equal(tensors["mask"], model.mask)
    assert_close({name: tensor for name, tensor in tensors.items() if "network" in name}, model.state_dict(), ROUNDED)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float64, 1e300), (torch.float64, 1e-300),
     (torch.float16, 65504.0), (torch.bfloat16, 3e38)],
)  # fmt: skip
def test_values_that_no_grid_holds_are_kept_exactly(dtype, largest, packed):
    odd = {f"odd {shape}": rand(*shape).double() for shape in ((9, 9), (5,))}
    odd = {name: (values / values.abs().max() * largest).to(dtype) for name, values in odd.items()}
    model = nn.ParameterDict(odd | {"plain": rand(9, 9, seed=1)})
    tensors, _ = packed(model, 2000)
    for name, values in odd.items():
        assert torch.equal(tensors[name], values), name
    assert_close({"plain": tensors["plain"]}, model.state_dict(), 1e-3)


@pytest.mark.parametrize("scale", [1e-13, 1e-6, 1e6, 1e17])
def test_small_and_large_weights_lose_the_same_part(scale, packed):
    model = nn.ParameterDict({"weight": scale * rand(16, 16)})
    tensors, _ = packed(model, 350)
    assert_close(tensors, model.state_dict(), 0.05)


ALL = ("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.mark.parametrize(("zeros", "batches"), [(ALL[:1], BATCHES), (ALL[2:3], BATCHES), (ALL, BATCHES), (ALL, None)])
def test_weights_of_zeros_come_back_as_zeros(zeros, batches, packed):
    """A last layer of zeros lets no gradient through: of the first one nothing can be learned then."""
    model = network()
    with torch.no_grad():
        for name in zeros:
            model.get_parameter(name).zero_()
    tensors, report = packed(model, 600, batches)
    assert all(not tensors[name].any() for name in zeros)
    assert_close(tensors, model.state_dict(), ROUNDED)
    assert report.unseen == ()


def test_a_convolution_that_reaches_no_output_is_stored_like_any_other(packed):
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    tensors, _ = packed(model, 600, [rand(6, 3, 4, 4)])
    assert_close(tensors, model.state_dict(), ROUNDED)


@pytest.mark.parametrize("form", ["auto", "sparse_pca", "vq"])
def test_constant_weights_come_back_as_constants(form, packed):
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    tensors, _ = packed(model, 800, BATCHES, Options(form))
    # A codebook has codewords of one byte an entry.
    assert_close(tensors, model.state_dict(), 5e-3 if form == "vq" else 1e-4)


# --- shapes and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [None, [rand(8, 1)]])
def test_a_network_of_one_weight_comes_back(batches, packed):
    model = filled(nn.Linear(1, 1))
    tensors, _ = packed(model, 250, batches)
    assert_close(tensors, model.state_dict(), 1e-4)


def test_numbers_without_axes_come_back(packed):
    model = Beside({"scale": torch.tensor(2.5)}, {"count": torch.tensor(7), "on": torch.tensor(True)})
    tensors, _ = packed(model, 460, BATCHES)
    assert (int(tensors["count"]), bool(tensors["on"])) == (7, True)
    assert float(tensors["scale"]) == pytest.approx(2.5, rel=1e-3)


class Empty(nn.Module):
    """Parameters without entries, used as weights: layers of a width that a setting made zero."""

    def __init__(self):
        super().__init__()
        self.network = network()
        self.no_outputs = nn.Parameter(torch.zeros(0, 12))
        self.no_inputs = nn.Parameter(torch.zeros(10, 0))
        self.register_buffer("nothing", torch.zeros(2, 0, 3, dtype=torch.int64))

    def forward(self, x):
        return self.network(x) + F.linear(F.linear(x, self.no_outputs), self.no_inputs)


def test_tensors_without_entries_come_back(packed, tmp_path):
    model = Empty()
    tensors, _ = packed(model, 460, BATCHES)
    assert_close(tensors, model.state_dict(), ROUNDED)
    for mode in ("dense", "on-the-fly"):
        found = factorpack.load(tmp_path / "model.fpk", Empty(), mode)
        torch.testing.assert_close(found(BATCHES[0]), model(BATCHES[0]), rtol=0, atol=0.5)


def scattered():
    """A network whose weights lie in memory in ways of their own."""
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 10)))
    model[0].to(memory_format=torch.channels_last)
    model[2].weight = nn.Parameter(0.3 * rand(32, 16, seed=1).T)
    model[3].weight = nn.Parameter((0.3 * rand(10, 32, seed=2))[:, ::2])
    assert not any(model[at].weight.is_contiguous() for at in (0, 2, 3))
    return model


def test_tensors_that_are_not_contiguous_come_back(packed, tmp_path):
    model = scattered()
    tensors, _ = packed(model, 800, [rand(16, 3, 3, 3)])
    assert_close(tensors, model.state_dict(), ROUNDED)
    found = factorpack.load(tmp_path / "model.fpk", scattered())
    for name, tensor in found.state_dict().items():
        assert tensor.stride() == model.state_dict()[name].stride()
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_come_back_with_calibration_in_them(dtype, packed, tmp_path):
    model = network().to(dtype)
    tensors, _ = packed(model, SIX_BITS, [batch.to(dtype) for batch in BATCHES])
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert_close(tensors, model.state_dict(), ROUNDED)
    found = factorpack.load(tmp_path / "model.fpk", network().to(dtype))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.state_dict().items())


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def test_buffers_of_integers_and_bools_come_back_exactly(packed, tmp_path):
    buffers = {}
    for dtype in INTEGERS:
        ends = torch.iinfo(dtype)
        middle = torch.randint(0, 100, (79,), generator=torch.Generator().manual_seed(0))
        buffers[str(dtype).removeprefix("torch.")] = torch.tensor([ends.min, *middle, ends.max], dtype=dtype).view(9, 9)
    buffers["mask"] = rand(9, 9) > 0
    model = Beside(buffers=buffers)
    tensors, _ = packed(model, 1500, BATCHES)
    blank = Beside(buffers={name: torch.zeros_like(values) for name, values in buffers.items()})
    found = factorpack.load(tmp_path / "model.fpk", blank).state_dict()
    for name, values in buffers.items():
        assert torch.equal(tensors[name], values), name
        assert torch.equal(found[name], values), name


class Overlapping(nn.Module):
    """Parameters that are windows of one storage, and a buffer that is a part of one of them."""

    def __init__(self, seed=0):
        super().__init__()
        rows = 0.3 * rand(24, 12, seed=seed)
        self.first, self.second = nn.Parameter(rows[:16]), nn.Parameter(rows[8:])
        self.turned = nn.Parameter(rows[:12].T)
        self.register_buffer("shown", self.first.detach()[2:5])

    def forward(self, x):
        return torch.cat([F.linear(x, self.first), F.linear(x, self.second), F.linear(x, self.turned)], 1)


def test_windows_of_one_storage_are_tensors_of_their_own(packed, tmp_path):
    model = Overlapping()
    tensors, report = packed(model, 660, BATCHES)
    assert {weight.name for weight in report.bill.weights} == {"first", "second", "turned"}
    assert_close(tensors, model.state_dict(), ROUNDED)
    # What they share in the model has one value, that of one of the tensors that were written there.
    found = factorpack.load(tmp_path / "model.fpk", Overlapping(seed=1))
    assert_close(found.state_dict(), model.state_dict(), ROUNDED)
    assert torch.equal(found.first[8:], found.second[:8])
    assert torch.equal(found.first[:12].T, found.turned)
    assert torch.equal(found.first[2:5], found.shown)


def test_a_tensor_that_repeats_its_memory_is_refused(packed, tmp_path):
    repeated = Beside(buffers={"level": torch.tensor([0.5]).expand(9, 9)})
    with pytest.raises(UnsupportedError, match=r"'level' repeats its memory.*clone\(\)"):
        factorpack.compress(repeated, SIX_BITS, BATCHES)
    packed(Beside(buffers={"level": torch.full((9, 9), 0.5)}), 900)
    with pytest.raises(UnsupportedError, match=r"'level' of the model repeats its memory: clone\(\)"):
        factorpack.load(tmp_path / "model.fpk", repeated)


def test_a_sparse_tensor_is_refused():
    with pytest.raises(UnsupportedError, match=r"'links' is of layout torch.sparse_coo: make it dense"):
        factorpack.compress(Beside(buffers={"links": torch.eye(9).to_sparse()}), SIX_BITS, BATCHES)


@pytest.mark.parametrize("batches", [None, BATCHES])
def test_a_tensor_without_values_is_named_before_the_network_is_run(batches):
    partly = network()
    partly[2].to("meta")
    lazy = nn.Sequential(nn.LazyLinear(12), nn.Linear(12, 10))
    for model, name in ((network().to("meta"), "0.weight"), (partly, "2.weight"), (lazy, "0.weight")):
        with pytest.raises(UnsupportedError, match=f"'{name}' has no values: load the trained weights"):
            factorpack.compress(model, SIX_BITS, batches)


def test_a_file_cannot_be_loaded_into_a_network_without_values(packed, tmp_path):
    packed(network(), SIX_BITS)
    with pytest.raises(UnsupportedError, match=r"'0.weight' of the model has no values .* call model.to_empty"):
        factorpack.load(tmp_path / "model.fpk", network().to("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_network_on_a_gpu_comes_back_there(packed, tmp_path):
    model = network().cuda()
    tensors, _ = packed(model, SIX_BITS, [batch.cuda() for batch in BATCHES])
    assert_close(tensors, model.state_dict(), ROUNDED)
    for mode in ("dense", "on-the-fly"):
        found = factorpack.load(tmp_path / "model.fpk", network().cuda(), mode)
        assert all(tensor.is_cuda for tensor in found.state_dict().values())
        torch.testing.assert_close(found(BATCHES[0].cuda()), model(BATCHES[0].cuda()), rtol=0, atol=0.5)
    with pytest.raises(TaskError, match="calibration batch 1: the model failed on it: .*device"):
        factorpack.compress(model, SIX_BITS, BATCHES)


# --- calibration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], iter(()), [torch.zeros(0, 12)] * 2])
def test_calibration_without_a_sample_is_refused(batches):
    with pytest.raises(TaskError, match="no batch, or none with a sample in it: give at least one, or leave"):
        factorpack.compress(network(), SIX_BITS, batches)


def test_an_empty_batch_among_others_does_no_harm(packed):
    tensors, _ = packed(network(), SIX_BITS, [*BATCHES, torch.zeros(0, 12)])
    assert_close(tensors, network().state_dict(), ROUNDED)
    image = filled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10)))
    tensors, _ = packed(image, 600, [rand(6, 3, 4, 4), torch.zeros(0, 3, 4, 4)])
    assert_close(tensors, image.state_dict(), ROUNDED)


def broken(value):
    batch = BATCHES[1].clone()
    batch[3, 2] = value
    return batch


class Around(nn.Module):
    """`network` with something after it."""

    def __init__(self, after):
        super().__init__()
        self.network, self.after = network(), after

    def forward(self, x):
        return self.after(self.network(x))


def without_gradient(x):
    with torch.no_grad():
        return x * 2


def far_from_itself(x):
    """The output, with a distance of zero, whose gradient is undefined."""
    return x + (x - x).square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("model", "second", "message"),
    [
        (network(), broken(torch.nan), "output is not finite; the batch holds NaN or infinite values: replace them"),
        (network(), {"input": broken(torch.inf)}, "output is not finite; the batch holds NaN or infinite values"),
        (Around(torch.nan_to_num), broken(torch.nan), r"the gradient of '[\w.]+' is not finite; the batch holds NaN"),
        (Around(lambda x: x.clamp_max(5).exp().log1p() / (x.max() < 6)), 50 * BATCHES[1],
         r"output is not finite; weights and batch are: .* Leave such samples out"),
        (network(), BATCHES[1][:, :7], "the model failed on it: RuntimeError: .*shapes"),
        (network(), {"images": BATCHES[1]}, "the model failed on it: TypeError: .*'images'"),
        (network(), "a sentence", "the model failed on it: TypeError"),
    ],
)  # fmt: skip
def test_a_batch_that_nothing_can_be_learned_from_is_named(model, second, message):
    with pytest.raises(TaskError, match=rf"^calibration batch 2: .*{message}"):
        factorpack.compress(model, SIX_BITS, [BATCHES[0], second])


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (torch.log, r"output is not finite; weights and batch are: .* logarithm at zero"),
        (far_from_itself, r"the gradient of 'network.0.weight' is not finite; weights and batch are"),
        (without_gradient, r"no gradient leads from the network's output to its weights.*leave no_grad"),
        (lambda x: x.argmax(1), r"no gradient leads .*: return logits or embeddings, not classes"),
    ],
)
def test_a_network_that_nothing_can_be_learned_of_is_told_why(after, message):
    with pytest.raises(TaskError, match=rf"^calibration batch 1: .*{message}"):
        factorpack.compress(Around(after), SIX_BITS, BATCHES)


def test_words_outside_a_vocabulary_are_told():
    model = filled(nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 10)))
    with pytest.raises(TaskError, match="batch 1: the model failed on it: IndexError: index out of range"):
        factorpack.compress(model, SIX_BITS, [torch.tensor([[3, 20]])])


def test_inputs_that_overflow_when_squared_are_told():
    model = nn.Linear(12, 10)
    with torch.no_grad():
        model.weight.zero_()
        # Nearly certain of one class: the gradients are small, where the inputs are not.
        model.bias[0] = 12
    with pytest.raises(TaskError, match="the inputs of 'weight' in calibration are too large to be squared: scale"):
        factorpack.compress(model, SIX_BITS, [1e19 * torch.ones(32, 12)])


def test_weights_that_calibration_never_reached_are_named_and_stored(packed):
    model = Beside({"table": rand(20, 8), "kernel": rand(4, 4, 3, 3, seed=1), "offset": rand(9, seed=2)})
    tensors, report = packed(model, 680, BATCHES)
    assert report.unseen == ("table", "kernel")
    assert_close(tensors, model.state_dict(), ROUNDED)


class Recurrent(nn.Module):
    """One layer that is called three times, between two that are called once."""

    def __init__(self):
        super().__init__()
        self.into, self.again, self.out = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        filled(self)

    def forward(self, x):
        x = self.into(x).tanh()
        for _ in range(3):
            x = self.again(x).tanh()
        return self.out(x)


def test_a_layer_that_is_called_several_times_is_stored_once(packed, tmp_path):
    model = Recurrent()
    tensors, report = packed(model, 690, BATCHES)
    assert [weight.name for weight in report.bill.weights] == ["into.weight", "again.weight", "out.weight"]
    assert_close(tensors, model.state_dict(), ROUNDED)
    found = factorpack.load(tmp_path / "model.fpk", Recurrent())
    with torch.no_grad():
        error = (found(BATCHES[0]) - model(BATCHES[0])).square().mean() / model(BATCHES[0]).var()
    assert error < 0.01


# --- sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 127])
def test_a_size_below_that_of_the_header_is_answered_with_one_that_can_be_met(size, packed):
    model = filled(nn.Linear(12, 10))
    with pytest.raises(BudgetError, match=rf"^{size} bytes cannot be met: the smallest file .* ask for more") as caught:
        factorpack.compress(model, size)
    smallest = int(re.search(r"takes ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))
    assert 128 < smallest < 300
    packed(model, smallest)


def test_a_network_without_tensors_is_a_header(packed):
    tensors, report = packed(nn.ReLU(), 128)
    assert tensors == {}
    assert report.size_bytes == 128
    with pytest.raises(BudgetError, match="the smallest file of this model takes 128 bytes"):
        factorpack.compress(nn.ReLU(), 127)


# --- the command line -----------------------------------------------------------------------------------------

TASK = """
    import torch

    def model():
        torch.manual_seed(0)
        return torch.nn.Linear(12, 10, device=DEVICE)

    def calibration():
        BODY
"""


@pytest.mark.parametrize(
    ("device", "body", "parts"),
    [
        ("cpu", "yield torch.ones(4, 12); yield torch.full((4, 12), torch.nan)",
         ("calibration batch 2", "the batch holds NaN or infinite values: replace them")),
        ("cpu", "torch.ones(4, 12)", ("calibration() returned None", "yield them")),
        ("meta", "yield torch.ones(4, 12)", ("'weight' has no values", "load the trained weights")),
        ("cpu", "yield {'images': torch.ones(4, 12)}", ("calibration batch 1", "TypeError")),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(device, body, parts, tmp_path):
    path = tmp_path / "task.py"
    path.write_text(dedent(TASK).replace("DEVICE", repr(device)).replace("BODY", body))
    found = run("compress", path, "--size", "600", "--out", tmp_path / "model.fpk")
    assert_one_line(found, *parts)
    assert not (tmp_path / "model.fpk").exists()


@pytest.mark.parametrize("size", [460, 530, 600, 650])
@pytest.mark.parametrize("batches", [None, BATCHES], ids=["without calibration", "with calibration"])
def test_a_file_with_room_to_spare_loses_no_layer(size, batches, packed):
    model = network()
    tensors, _ = packed(model, size, batches)
    assert_close(tensors, model.state_dict(), 0.15)


@pytest.mark.parametrize("batches", [None, BATCHES], ids=["without calibration", "with calibration"])
def test_weights_beside_large_exact_tensors_get_their_share(batches, packed):
    table = torch.randint(256, (4000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = Beside(buffers={"table": table})
    tensors, _ = packed(model, 4500, batches)
    assert torch.equal(tensors.pop("table"), table)
    assert_close(tensors, model.state_dict(), ROUNDED)


class Routed(nn.Module):
    """Takes its second layer only where the first one's output is, to the last bit, what it was."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 10)
        filled(self)
        with torch.no_grad():
            self.usual = [self.first(batch) for batch in BATCHES]

    def forward(self, batch):
        found = self.first(batch)
        known = any(torch.equal(found, usual) for usual in self.usual)
        return self.head(torch.relu(self.second(found) if known else found))


def test_a_layer_that_the_compressed_network_never_comes_to_is_stored(packed):
    model = Routed()
    tensors, report = packed(model, 600, BATCHES)
    assert not report.unseen
    # The head makes up for what the layer no longer does.
    del tensors["head.weight"], tensors["head.bias"]
    assert_close(tensors, model.state_dict(), ROUNDED)
