"""Peers that need nothing but the tests' own packages: what they write is what they read, and nothing else scores."""

import copy
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import factorpack.cache
from factorpack.bench import protocol
from factorpack.bench.registry import PEERS, parse_peers
from factorpack.errors import UnsupportedError
from factorpack.task import load_task

PACKAGES = {"uniform": "constriction", "palette": "sklearn", "float16": "zstandard"}
FINE = {"uniform": "0.02", "palette": "6", "float16": "float16"}


@pytest.mark.parametrize("name", FINE)
def test_a_file_alone_gives_the_network_back(name, digits_task, tmp_path):
    pytest.importorskip(PACKAGES[name])
    script = import_module(f"factorpack.bench.peers.{name}")
    task = load_task(str(digits_task.path))
    path = tmp_path / "network"
    encoded = protocol.encode_once(task, script.encode, path, FINE[name], tmp_path / "work")
    assert encoded["bytes"] == path.stat().st_size < digits_task.size_bytes
    assert encoded["encode_seconds"] > 0
    assert encoded["encode_peak_bytes"] > 10**7
    # A palette leaves small weights as they are, and says so.
    assert encoded["left_dense"] == (["convolutions.0.weight", "head.weight"] if name == "palette" else [])
    assert 0.9 < encoded["quantised_share"] <= 1
    scored = protocol.score_once(task, script.decode, path)
    assert scored["scores"]["accuracy"] == pytest.approx(digits_task.scores["accuracy"], abs=1)


def test_coarser_files_are_smaller_and_worse(digits_task, tmp_path):
    pytest.importorskip("constriction")
    from factorpack.bench.peers import uniform

    task = load_task(str(digits_task.path))
    found = []
    for setting in ("0.1", "1", "3"):
        encoded = protocol.encode_once(task, uniform.encode, tmp_path / setting, setting, tmp_path)
        scores = protocol.score_once(task, uniform.decode, tmp_path / setting)["scores"]
        found.append((encoded["bytes"], scores["minus_nats"]))
    assert found == sorted(found, reverse=True)


def test_what_an_analysis_took_is_counted_for_each_of_its_files(digits_task, tmp_path, monkeypatch):
    from factorpack.bench.peers import factorpack as script

    # Two λ instead of all are enough to pack a file.
    rates_of = factorpack.cache.rates_of
    monkeypatch.setattr(factorpack.cache, "rates_of", lambda state: rates_of(state)[2:7:4])
    task = load_task(str(digits_task.path))
    first, second = (
        protocol.encode_once(task, script.encode, tmp_path / ratio, f"auto/{ratio}", tmp_path / "work")
        for ratio in ("5", "8")
    )
    assert second["bytes"] < first["bytes"]
    scored = protocol.score_once(task, script.decode, tmp_path / "5")
    assert scored["scores"]["accuracy"] == pytest.approx(digits_task.scores["accuracy"], abs=2)
    assert second["encode_seconds"] > 0.5 * first["encode_seconds"]
    # One that was stopped is made anew, as nobody knows what it took.
    (tmp_path / "work" / "auto" / "spent.json").unlink()
    again = protocol.encode_once(task, script.encode, tmp_path / "again", "auto/5", tmp_path / "work")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "5").read_bytes()
    assert again["encode_seconds"] > 0.3 * first["encode_seconds"]


def test_other_forms_are_searched_for_without_an_analysis(digits_task, tmp_path):
    from factorpack.bench.peers import factorpack as script

    task = load_task(str(digits_task.path))
    encoded = protocol.encode_once(task, script.encode, tmp_path / "file", "direct/8", tmp_path / "work")
    assert not list(tmp_path.rglob("spent.json"))
    dense = sum(tensor.nbytes for tensor in task.model().state_dict().values())
    assert encoded["bytes"] == pytest.approx(dense / 8, rel=0.03)


def test_values_that_a_file_lacks_are_not_taken_from_the_original(digits_network):
    tensors = {name: tensor.clone() for name, tensor in digits_network.state_dict().items()}
    blank = protocol.blank(copy.deepcopy(digits_network))
    assert all(tensor.isnan().all() for tensor in blank.parameters())
    with pytest.raises(KeyError, match=r"head\.bias"):
        protocol.place(blank, {name: tensor for name, tensor in tensors.items() if name != "head.bias"})
    protocol.place(blank, tensors)
    assert torch.equal(blank.head.weight, digits_network.head.weight)


def test_tied_weights_are_one():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert list(protocol.Subject(model, [], "logits", Path()).weights) == ["0.weight"]
    protocol.place(protocol.blank(model), {"0.weight": torch.eye(4)})
    assert torch.equal(model[1].weight, torch.eye(4))


def test_peers_are_asked_for_by_name_and_setting():
    assert [run.name for run in parse_peers("nncodec:-24, palette")] == [
        "nncodec:-24", "palette:6", "palette:4", "palette:3", "palette:2",
    ]  # fmt: skip
    everything = parse_peers("all")
    assert {run.peer.name for run in everything} == set(PEERS)
    assert parse_peers("all,uniform") == everything
    for wrong in ("nnncodec", "", "all:4"):
        with pytest.raises(UnsupportedError):
            parse_peers(wrong)


def test_every_requirement_is_pinned():
    for peer in PEERS.values():
        assert all(requirement.count("==") == 1 for requirement in peer.requirements), peer.name
