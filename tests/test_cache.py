"""The cache of an analysis: the same bytes warm and cold, mended where it is damaged, never taken for another's."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from factorpack import Options, UnsupportedError
from factorpack import cache as cache_module
from factorpack.cache import analyse, key_of
from factorpack.coding.records import predicted_bits
from factorpack.pipeline import Source
from factorpack.task import load_task


def silent(_stage: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def source(digits_task) -> Source:
    task = load_task(str(digits_task.path))
    return Source(task.model(), task.calibration(), task.output)


RATES = cache_module.rates_of


@pytest.fixture(scope="module", autouse=True)
def few_rungs():
    """Every sixth λ: a rung takes tenths of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "rates_of", lambda state: RATES(state)[2::6])
        yield


class Watch:
    """What an analysis did: stages that began, notes."""

    def __init__(self):
        self.stages, self.notes = [], []

    def progress(self, stage: str, done: int, _total: int) -> None:
        if done == 0:
            self.stages.append(stage)

    def analysis(self, source, folder, options=None):
        return analyse(source, options or Options(), folder, self.progress, self.notes.append)


@pytest.fixture(scope="module")
def cold(source, few_rungs, tmp_path_factory):
    """A folder with an analysis of a few rungs, and the bytes of a file that was made with it."""
    folder = tmp_path_factory.mktemp("cache")
    analysis = Watch().analysis(source, folder)
    return folder, analysis.pack(6000, silent).data


@pytest.fixture
def folder(cold, tmp_path):
    """A copy of that folder: its only part."""
    (part,) = cold[0].iterdir()
    (tmp_path / part.name).mkdir()
    for path in part.iterdir():
        (tmp_path / part.name / path.name).write_bytes(path.read_bytes())
    return tmp_path / part.name


def test_a_warm_cache_gives_the_bytes_of_a_cold_one(source, cold, folder):
    watch = Watch()
    analysis = watch.analysis(source, folder.parent)
    assert "calibration" not in watch.stages
    assert "rounding" not in watch.stages
    assert analysis.pack(6000, watch.progress).data == cold[1]
    assert "rounding" not in watch.stages, "λ was searched"
    assert 0.99 * 6000 <= len(cold[1]) <= 6000
    assert watch.notes == []


def test_what_a_kill_left_out_is_made_and_nothing_else(source, cold, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "rung-01.json").unlink()
    (folder / "rung-02.json").unlink()
    watch = Watch()
    analysis = watch.analysis(source, folder.parent)
    assert watch.stages.count("rounding") == 2
    assert "calibration" not in watch.stages
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert analysis.pack(6000, silent).data == cold[1]


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def another_number(data: bytes) -> bytes:
    place = max(place for place, byte in enumerate(data) if byte in b"123456789")
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def another_key(data: bytes) -> bytes:
    return json.dumps(json.loads(data) | {"key": "0" * 64}).encode()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rung-01.json", truncated),
        ("rung-01.json", another_number),
        ("rung-01.json", another_key),
        ("rates.json", lambda _: b""),
        ("rates.json", lambda _: b"[1]"),
        ("statistics.json", lambda _: b"\xff\xfe"),
        ("statistics.safetensors", truncated),
        ("statistics.safetensors", another_number),
        ("statistics.safetensors", None),
    ],
)
def test_a_damaged_file_is_made_again_with_a_note(source, folder, name, damage):
    path = folder / name
    data = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(data))
    watch = Watch()
    watch.analysis(source, folder.parent)
    assert len(watch.notes) == 1
    assert "is damaged or of another model: it is made again" in watch.notes[0]
    assert path.read_bytes() == data


def test_weights_that_no_prefix_meets_come_from_the_cache(source, tmp_path):
    bare = Source(source.model)
    first = Watch().analysis(bare, tmp_path)
    assert first.state.prefix is None
    (part,) = tmp_path.iterdir()
    assert len(list(part.glob("rung-*.fpk"))) == len(first.rungs)
    packed = first.pack(7000, silent)
    watch = Watch()
    assert watch.analysis(bare, tmp_path).pack(7000, silent).data == packed.data
    assert "rounding" not in watch.stages[: watch.stages.index("analysis") + 1]
    damaged = part / "rung-02.fpk"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-30])
    assert watch.analysis(bare, tmp_path).pack(7000, silent).data == packed.data
    assert len(watch.notes) == 1
    assert damaged.read_bytes() == data


def test_another_question_has_another_part_of_the_folder(source, cold, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    Watch().analysis(source, folder.parent, Options("direct"))
    assert len(list(folder.parent.iterdir())) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"form": "direct"},
        {"seed": 1},
        {"exclude": ("head.*",)},
        {"keep_batch_norms": True},
    ],
)
def test_the_key_tells_options_apart(source, change):
    assert key_of(source, Options()) == key_of(source, Options())
    assert key_of(source, replace(Options(), **change)) != key_of(source, Options())


def test_the_key_tells_rules_of_ranks_apart(source):
    assert key_of(source, Options("svd", rank="vbmf")) != key_of(source, Options("svd"))


def test_weights_made_again_have_the_ranks_of_the_options(source, tmp_path):
    rung = Watch().analysis(source, tmp_path, Options("svd", rank="vbmf")).rungs[-1]
    sizes = {name: predicted_bits(candidate.make()) / 8 for name, candidate in rung.layers.items()}
    assert sizes == {name: candidate.size_bytes for name, candidate in rung.layers.items()}


def test_the_key_tells_models_and_data_apart(source, digits_task, monkeypatch):
    key = key_of(source, Options())
    task = load_task(str(digits_task.path))
    assert key_of(Source(task.model(), task.calibration(), task.output), Options()) == key
    other = task.model()
    other.head.bias.data[0] += 1e-6
    wider = task.model()
    wider.convolutions[0].padding = (2, 2)
    batches = source.batches
    changed = [batch.clone() for batch in batches]
    changed[-1][-1, 0, 0, 0] += 1e-6
    keys = {
        key,
        key_of(replace(source, model=other), Options()),
        key_of(replace(source, model=wider), Options()),
        key_of(replace(source, model=task.model().half()), Options()),
        key_of(replace(source, batches=batches[:-1]), Options()),
        key_of(replace(source, batches=changed), Options()),
        key_of(replace(source, batches=None), Options()),
        key_of(replace(source, output="embedding"), Options()),
    }
    monkeypatch.setattr(cache_module, "__version__", "0.0.0")
    assert len(keys | {key_of(source, Options())}) == 9


def test_the_key_reads_batches_of_every_kind():
    model = nn.Linear(3, 3)
    batches = [
        {"x": torch.ones(2, 3, dtype=torch.bfloat16), "names": ["a", None], "flag": True, "n": 1},
        (torch.ones(2, 3), np.ones(3), 2.5),
        torch.zeros(0, 3),
    ]
    key = key_of(Source(model, batches), Options())
    assert key == key_of(Source(model, batches), Options())
    batches[0]["names"] = ["a", "None"]
    assert key != key_of(Source(model, batches), Options())
    with pytest.raises(UnsupportedError, match="a calibration batch holds a object"):
        key_of(Source(model, [(object(),)]), Options())


@pytest.mark.parametrize("options", [Options("vq"), Options("direct", "projected-gradient")])
def test_forms_that_no_rate_leads_to_have_no_analysis(source, tmp_path, options):
    with pytest.raises(UnsupportedError, match="there is no analysis of form vq and of projected gradients"):
        Watch().analysis(source, tmp_path, options)
    assert not list(tmp_path.iterdir())
