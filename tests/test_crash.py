"""What a kill, a full disk or a second writer leaves: no file, the old one or a complete new one; and how to go on."""

import csv
import errno
import json
import tempfile
from itertools import count
from pathlib import Path

import pytest
from kills import OLD, Ended, Processes, Question, at_any_time, compressing, finetuning, while_writing
from test_cli import assert_one_line, run

from factorpack import container

KILLS = 6


@pytest.fixture(scope="module")
def processes() -> Processes:
    return Processes()


@pytest.fixture(scope="module")
def compression(processes, digits_task, tmp_path_factory) -> Question:
    return compressing(processes, digits_task.path, tmp_path_factory.mktemp("compression"))


@pytest.fixture(scope="module")
def training(processes, digits_task, tmp_path_factory) -> Question:
    return finetuning(processes, digits_task.path, tmp_path_factory.mktemp("training"))


@pytest.fixture
def out(tmp_path) -> Path:
    """The final name, and a file that has it already."""
    path = tmp_path / "out.fpk"
    path.write_bytes(OLD)
    return path


# --- kills ----------------------------------------------------------------------------------------------------------


def test_compress_that_is_killed_goes_on_to_the_same_bytes(processes, compression, tmp_path):
    found = compression.kill(processes, tmp_path / "out.fpk", KILLS, at_any_time(compression.seconds / 2))
    assert found.total() == KILLS


def test_finetune_that_is_killed_goes_on_to_the_same_bytes_and_log(processes, training, tmp_path):
    out = tmp_path / "out.fpk"
    found = training.kill(processes, out, KILLS, at_any_time(training.seconds / 2))
    assert found.total() == KILLS
    assert [path.name for path in training_of(out).glob("[!.]*")] == ["log.csv"]
    assert without_times(out) == without_times(training.out)


def training_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.training")


def without_times(out: Path) -> list[dict[str, str]]:
    with (training_of(out) / "log.csv").open(newline="") as log:
        return [row | {"seconds": ""} for row in csv.DictReader(log)]


def test_a_kill_before_any_line_of_writing_leaves_the_old_file_or_the_new_one(processes, compression, out):
    found = []
    dense = run("decompress", compression.out, "--out", out.with_name("dense"))
    assert dense.exit_code == 0
    for line in count(1):
        ended = processes.run("decompress", compression.out, "--out", out, line=line)
        found.append(out.read_bytes())
        if not ended.killed:
            break
    new = out.with_name("dense").read_bytes()
    old = found.count(OLD)
    assert found == [OLD] * old + [new] * (len(found) - old)
    assert old > 5
    assert len(found) - old > 2
    stray = {path.name for path in out.parent.iterdir()} - {"out.fpk", "dense"}
    assert all(name.startswith(".out.fpk.") and name.endswith(".part") for name in stray)


@pytest.mark.parametrize("question", ["compression", "training"])
def test_a_kill_while_files_are_written_is_made_up_for(processes, question, request, tmp_path):
    asked = request.getfixturevalue(question)
    assert asked.kill(processes, tmp_path / "out.fpk", KILLS // 2, while_writing()).total() == KILLS // 2


def test_resume_and_a_cache_give_the_same_bytes_and_take_up_the_same_work(processes, compression, tmp_path):
    out, cache = tmp_path / "out.fpk", tmp_path / "cache"
    ended = processes.run(*compression.arguments, "--resume", "--cache", cache, "--out", out)
    assert ended.exit_code == 0, ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out.fpk", "cache"}
    assert out.read_bytes() == compression.whole
    cache.rename(tmp_path / "out.fpk.cache")
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.fpk.cache/*/*")}
    out.unlink()
    assert processes.run(*compression.arguments, "--resume", "--out", out).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.fpk.cache/*/*")} == kept
    assert {path.name for path in next(iter(kept)).parent.glob("*.json")} >= {"statistics.json", "rung-00.json"}
    assert out.read_bytes() == compression.whole


@pytest.mark.parametrize("how", [("--form", "vq"), ("--form", "direct", "--solver", "projected-gradient")])
def test_what_cannot_be_resumed_says_so(digits_task, tmp_path, how):
    found = run("compress", digits_task.path, "--size", "6KB", *how, "--resume", "--out", tmp_path / "out.fpk")
    assert_one_line(found, "there is no analysis of form vq and of projected gradients", "without --cache and --resume")
    assert not list(tmp_path.iterdir())


# --- full disks -----------------------------------------------------------------------------------------------------


def assert_refused(ended: Ended, path: Path) -> None:
    assert_one_line(ended, f"cannot write {path}", "File too large; free space there, or choose another place")


def test_a_disk_too_small_for_the_file_leaves_the_old_one(processes, compression, training, out):
    assert_refused(processes.run(*compression.arguments, "--out", out, most_bytes=3000), out)
    assert out.read_bytes() == OLD
    assert list(out.parent.iterdir()) == [out]
    assert_refused(processes.run(*training.arguments, "--out", out, most_bytes=1000), out)
    assert out.read_bytes() == OLD
    assert_refused(processes.run("decompress", compression.out, "--out", out, most_bytes=3000), out)
    assert out.read_bytes() == OLD


def test_a_disk_too_small_for_the_cache_leaves_the_old_file_and_nothing_torn(processes, compression, out):
    ended = processes.run(*compression.arguments, "--resume", "--out", out, most_bytes=10_000)
    (folder,) = out.with_name("out.fpk.cache").iterdir()
    assert_refused(ended, folder / "statistics.safetensors")
    assert out.read_bytes() == OLD
    assert not list(folder.iterdir())


def test_a_disk_too_small_for_the_state_of_a_training_leaves_the_best_file_and_a_way_to_go_on(processes, training, out):
    ended = processes.run(*training.arguments, "--out", out, most_bytes=20_000)
    assert_refused(ended, training_of(out) / "state.pt")
    container.read(out)
    assert [path.name for path in training_of(out).iterdir()] == ["log.csv"]
    ended = processes.run(*training.arguments, "--resume", "--out", out)
    assert ended.exit_code == 0, ended.stderr
    assert out.read_bytes() == training.whole
    assert without_times(out) == without_times(training.out)


def test_folders_that_cannot_be_made_are_said(training, digits_task, out):
    for name in ("cache", "training"):
        out.with_name(f"out.fpk.{name}").write_text("")
    found = run("compress", digits_task.path, "--size", "6KB", "--resume", "--out", out)
    assert_one_line(found, f"cannot make the folder {out}.cache", "choose another place")
    found = run(*training.arguments, "--out", out)
    assert_one_line(found, f"cannot make the folder {out}.training", "choose another place")
    assert out.read_bytes() == OLD


def test_a_disk_too_small_for_temporary_folders_is_said(digits_task, out, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/folder")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    found = run("compress", digits_task.path, "--max-drop", "1", "--out", out)
    assert_one_line(found, "No space left on device: '/tmp/folder': free space there")
    assert out.read_bytes() == OLD


# --- several writers ------------------------------------------------------------------------------------------------


def test_two_processes_that_write_one_file_take_turns(processes, tmp_path):
    path = tmp_path / "file"
    files = [bytes([number]) * 300_000 for number in (1, 2)]
    writers = [processes.begin_to_write(path, data, 60) for data in files]
    seen = set()
    while any(writer.alive() for writer in writers):
        if path.exists():
            data = path.read_bytes()
            assert data in files
            seen.add(data[0])
    assert [writer.end().exit_code for writer in writers] == [0, 0]
    assert path.read_bytes() in files
    assert seen == {1, 2}
    assert list(tmp_path.iterdir()) == [path]


def test_two_compressions_of_one_output_and_cache_at_once(processes, compression, digits_task, tmp_path):
    out, cache = tmp_path / "out.fpk", tmp_path / "cache"
    others = ("compress", digits_task.path, "--size", "4KB", "--form", "direct", "--cache", cache)
    ours = (*compression.arguments, "--cache", cache)
    running = [processes.begin(*arguments, "--out", out) for arguments in (ours, others)]
    seen = set()
    while any(process.alive() for process in running):
        if out.exists():
            container.read(out)
            seen.add(out.read_bytes())
    for process in running:
        ended = process.end()
        assert ended.exit_code == 0, ended.stderr
        assert "damaged" not in ended.stderr
    alone = [tmp_path / "ours.fpk", tmp_path / "others.fpk"]
    for path, arguments in zip(alone, (ours, others), strict=True):
        ended = processes.run(*arguments, "--out", path, "--json")
        assert "damaged" not in ended.stderr
        assert json.loads(ended.stdout.splitlines()[-1])["size_bytes"] == path.stat().st_size
    assert alone[0].read_bytes() == compression.whole
    assert seen | {out.read_bytes()} <= {path.read_bytes() for path in alone}
