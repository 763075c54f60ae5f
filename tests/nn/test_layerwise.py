"""Networks on disk, calibrated block by block, against the same networks in memory."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("accelerate", reason="networks on disk need accelerate")

from factorpack.errors import MismatchError, TaskError
from factorpack.nn import layerwise
from factorpack.nn.layerwise import Observation, calibrate
from factorpack.nn.on_disk import NetworkOnDisk
from factorpack.nn.state import read_on_disk, read_state
from factorpack.nn.statistics import collect
from factorpack.nn.stored import StoredTensors
from factorpack.store import Store, unheard


class Block(nn.Module):
    """Takes what it needs by keyword, and hands on a tensor that later blocks have gradients for."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, *, shift: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, str]:
        hidden = torch.tanh(self.up(self.norm(x))) @ self.down.weight.T + shift
        return x + hidden * mask, hidden, "a word"


class Network(nn.Module):
    def __init__(self, width: int = 12, depth: int = 3, tied: bool = False):
        super().__init__()
        self.table = nn.Embedding(30, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 30, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.order = range(depth)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        shift, mask = 0.1 * x, (ids > 0)[..., None]
        for place in self.order:
            x, shift, _ = self.layers[place](x, shift=shift, mask=mask)
        return self.head(F.normalize(x, dim=-1))


class Twice(Network):
    """Its table is its head, too, without a name for that."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + F.linear(self.table(ids), self.table.weight)


def network(**options) -> Network:
    torch.manual_seed(0)
    return Network(**options).eval()


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randint(0, 30, (5, 7), generator=torch.Generator().manual_seed(at)) for at in range(count)]


def on_disk(model: nn.Module, folder: Path) -> NetworkOnDisk:
    path = folder / "weights.safetensors"
    tied = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    save_file({name: tensor.detach().clone() for name, tensor in tied.values()}, path)
    empty = copy.deepcopy(model).to("meta")
    if model.head.weight is model.table.weight:
        empty.head.weight = empty.table.weight
    return NetworkOnDisk(empty, StoredTensors([path]))


def store(folder: Path) -> Store:
    (folder / "store").mkdir(exist_ok=True)
    return Store(folder / "store", "key", unheard)


def silent(_stage: str, _done: int, _total: int) -> None:
    pass


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_it_gives_what_the_network_gives(tmp_path):
    model = network(tied=True)
    there = on_disk(model, tmp_path)
    ids = batches()[0]
    assert list(there.blocks) == ["layers.0", "layers.1", "layers.2"]
    assert torch.equal(there(ids), model(ids))
    # Nothing of it stays in memory.
    assert all(parameter.is_meta for parameter in there.model.parameters())


@pytest.mark.parametrize("output", ["logits", "embedding"])
def test_calibration_says_what_it_says_of_the_network_in_memory(output, tmp_path):
    model = network()
    there = on_disk(model, tmp_path)
    known = read_state(model.state_dict(keep_vars=True), model, collect(model, batches(), output, 3))
    found = read_on_disk(there, calibrate(Observation(there, batches(), output), 3, store(tmp_path), silent))
    assert list(found.dtypes.items()) == list(known.dtypes.items())
    assert list(found.layers) == list(known.layers)
    assert found.unseen == known.unseen == ()
    for name, layer in known.layers.items():
        other = found.layers[name]
        assert (other.tiling, other.looked_up) == (layer.tiling, layer.looked_up)
        assert (other.tensor == layer.tensor).all()
        assert_near(other.metric.row_weights, layer.metric.row_weights)
        assert (other.metric.moments is None) == (layer.metric.moments is None)
        if layer.metric.moments is not None:
            assert_near(other.metric.moments, layer.metric.moments)
    for name, small in known.small.items():
        assert_near(torch.from_numpy(found.small[name].curvature), torch.from_numpy(small.curvature))


@pytest.mark.parametrize("kind", [Network, Twice])
def test_a_table_is_let_go_of_where_nothing_but_a_look_up_needs_it(kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = kind().eval()
    there, gone, let_go = on_disk(model, tmp_path), [], layerwise._let_go

    def told(parameter: Tensor) -> None:
        gone.append((parameter is there.model.table.weight, parameter.grad is None and not taken))
        let_go(parameter)

    taken: list[str] = []
    of_gradient = layerwise._Record.take_gradient

    def noted(self, name, parameter, sums):
        taken.extend([name] if name == "table.weight" else [])
        of_gradient(self, name, parameter, sums)

    monkeypatch.setattr(layerwise, "_let_go", told)
    monkeypatch.setattr(layerwise._Record, "take_gradient", noted)
    seen = calibrate(Observation(there, batches(), "logits"), 0, store(tmp_path), silent)
    assert ((True, True) in gone) == (kind is Network)
    known = collect(model, batches(), "logits", 0).fisher
    for name in ("table.weight", "head.weight", "layers.0.up.weight"):
        assert_near(seen[name].energies, known[name].sum(1))


def test_of_a_tied_tensor_the_uses_count_each_by_itself(tmp_path):
    model = network(tied=True)
    there = on_disk(model, tmp_path)
    found = read_on_disk(there, calibrate(Observation(there, batches(), "logits"), 0, store(tmp_path), silent))
    assert found.aliases == {"head.weight": "table.weight"}
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(model.head.weight.detach().clone())
    apart = collect(untied, batches(), "logits", 0).fisher
    expected = (apart["table.weight"] + apart["head.weight"]).sum(1)
    seen = calibrate(Observation(there, batches(), "logits"), 0, store(tmp_path), silent)
    assert_near(seen["head.weight"].energies, expected)


def test_threads_change_no_bit(tmp_path):
    model = network()
    found = []
    for threads in (1, 3):
        folder = tmp_path / str(threads)
        folder.mkdir()
        there = on_disk(model, folder)
        seen = calibrate(Observation(there, batches(), "logits"), 0, store(folder), silent, threads)
        found.append([seen[name] for name in there.tensors])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.energies, other.energies)
        if one.statistics is not None:
            assert torch.equal(one.statistics.moments, other.statistics.moments)


def test_a_pass_that_was_stopped_goes_on_where_it_was(tmp_path):
    model, whole, part = network(), tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()

    def stopped(_stage: str, done: int, _total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    there = on_disk(model, part)
    with pytest.raises(KeyboardInterrupt):
        calibrate(Observation(there, batches(), "logits"), 0, store(part), stopped)
    assert not list(store(part).folder.glob("tmp*"))
    kept = {path: path.stat().st_mtime_ns for path in store(part).folder.iterdir()}
    assert any("before-" in path.name for path in kept)
    found = calibrate(Observation(there, batches(), "logits"), 0, store(part), silent)
    # What led through the blocks is of no more use.
    left = {path: time for path, time in kept.items() if path.exists()}
    assert {path.name for path in kept.keys() - left.keys()} == {
        f"before-layers.{place}{suffix}" for place in (1, 2) for suffix in (".json", ".safetensors")
    }
    assert all(path.stat().st_mtime_ns == time for path, time in left.items())
    expected = calibrate(Observation(on_disk(model, whole), batches(), "logits"), 0, store(whole), silent)
    for name in there.tensors:
        assert torch.equal(found[name].energies, expected[name].energies)

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    calibrate(Observation(there, batches(), "logits"), 0, store(part), never)


def test_what_is_damaged_is_made_again(tmp_path):
    there = on_disk(network(), tmp_path)
    observed = Observation(there, batches(), "logits")
    expected = calibrate(observed, 0, store(tmp_path), silent)["layers.1.up.weight"].energies
    path = store(tmp_path).path(there.entries["layers.1.up.weight"], ".safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    found = calibrate(observed, 0, store(tmp_path), silent)
    assert torch.equal(found["layers.1.up.weight"].energies, expected)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TaskError, match="was damaged meanwhile"):
        found["layers.1.up.weight"]


class Odd(nn.Module):
    """Takes one tensor twice, and works on it in place."""

    def __init__(self, width: int, own: nn.Linear):
        super().__init__()
        self.norm, self.shared = nn.LayerNorm(width), own

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        hidden = torch.tanh(self.shared(self.norm(residual)))
        x += hidden
        return x


class OddNetwork(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.position = nn.Parameter(torch.randn(7, width))
        self.table = nn.Embedding(30, width)
        shared = nn.Linear(width, width)
        self.layers = nn.ModuleList(Odd(width, shared) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        # Of a single sample the gradient of the sum and that of the positions are one memory.
        x = 2 * self.table(ids) + self.position[None]
        for layer in self.layers:
            x = layer(x.clone() if x.requires_grad else x, residual=x)
        return x


def test_blocks_that_share_weights_and_inputs(tmp_path):
    torch.manual_seed(0)
    model = OddNetwork().eval()
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items() if ("layers.1" not in name
               and "layers.2" not in name) or "norm" in name}, path)  # fmt: skip
    with torch.device("meta"):
        empty = OddNetwork().eval()
    there = NetworkOnDisk(empty, StoredTensors([path]))
    assert set(there.tied.values()) == {"layers.0.shared.weight", "layers.0.shared.bias"}
    single = [ids[:1] for ids in batches()]
    seen = calibrate(Observation(there, single, "embedding"), 0, store(tmp_path), silent)
    apart = copy.deepcopy(model)
    for layer in apart.layers:
        layer.shared = copy.deepcopy(model.layers[0].shared)
    known = collect(apart, single, "embedding", 0)
    for name in ("position", "table.weight"):
        assert_near(seen[name].energies, known.fisher[name].sum(1))
    uses = [f"layers.{place}.shared.weight" for place in range(3)]
    assert_near(seen[uses[0]].energies, sum(known.fisher[name].sum(1) for name in uses))
    assert_near(seen[uses[0]].statistics.moments, sum(known.weights[name].moments for name in uses) / 3)


def test_weights_that_are_not_there_are_named(tmp_path):
    model = network()
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor for name, tensor in model.state_dict().items() if name != "layers.1.up.bias"}, path)
    with pytest.raises(MismatchError, match=r"'layers\.1\.up\.bias' is of shape \(24,\); on disk it is not there"):
        NetworkOnDisk(copy.deepcopy(model).to("meta"), StoredTensors([path]))
    save_file(model.state_dict() | {"head.weight": torch.ones(3, 12)}, path)
    with pytest.raises(MismatchError, match=r"'head\.weight' .* on disk it has shape \(3, 12\)"):
        NetworkOnDisk(copy.deepcopy(model).to("meta"), StoredTensors([path]))


def test_what_cannot_be_calibrated_block_by_block_says_so(tmp_path):
    model = network()
    there = on_disk(model, tmp_path)
    there.model.order = [0, 1, 1]
    with pytest.raises(TaskError, match=r"goes through layers\.1 more than once"):
        calibrate(Observation(there, batches(), "logits"), 0, store(tmp_path), silent)
    there.model.order = range(3)
    with pytest.raises(TaskError, match="no batch"):
        calibrate(Observation(there, [], "logits"), 0, store(tmp_path), silent)
    with pytest.raises(TaskError, match="the model failed on calibration data: index out of range"):
        calibrate(Observation(there, [torch.tensor([[99]])], "logits"), 0, store(tmp_path), silent)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("layers.1.up.weight", r"the gradient of '[a-z0-9.]+' is not finite; 'layers\.1\.up\.weight' holds NaN"),
        ("head.weight", r"output is not finite; 'head\.weight' holds NaN"),
    ],
)
def test_what_is_not_finite_is_told(name, told, tmp_path):
    model = network()
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.inf
    with pytest.raises(TaskError, match=told):
        calibrate(Observation(on_disk(model, tmp_path), batches(), "logits"), 0, store(tmp_path), silent)
