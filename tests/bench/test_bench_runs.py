"""Runs: kept point by point, gone on with, not stopped by a peer that fails."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from typer.testing import CliRunner

from factorpack.bench import environments, registry, results, runs
from factorpack.bench.registry import Peer, Run
from factorpack.bench.results import Original, Point, Results, read_results
from factorpack.bench.runs import Bench, run_all
from factorpack.cli import app
from factorpack.errors import TaskError, UnsupportedError

FIRST, SECOND = (Run(Peer(name, name, "knob", ("1", "2"), "uniform"), "1") for name in ("first", "second"))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A bench of a task that is not run: each point is measured by making one up."""
    task = tmp_path / "task.py"
    task.write_text("")
    measured = []

    def measure(self, run, threads):
        assert int(threads) >= 1
        measured.append(run.name)
        return Point(run.peer.name, run.setting, self.key(run), self.versions(run), self.command(run), "c", "m",
                     bytes=100, wrapped_bytes=90, scores={"score": 1.0})  # fmt: skip

    monkeypatch.setattr(Bench, "measure", measure)
    monkeypatch.setattr(runs, "_process", lambda _command: json.dumps({"bytes": 1000, "scores": {"score": 2.0}}))
    return Bench(str(task), tmp_path / "out", tmp_path / "work"), measured


def nobody(_told: object) -> None:
    pass


def test_a_run_goes_on_where_it_was(bench):
    made, measured = bench
    lines = []
    run_all([made], [FIRST], lines.append, nobody)
    assert measured == ["first:1"]
    assert lines[:2] == ["1 of 1 points are to be measured", "task: scoring the original"]
    assert "90 bytes, score 1" in lines[2]
    assert "to go" in lines[2]
    drawn = []
    (found,) = run_all([made], [FIRST, SECOND], nobody, drawn.append)
    assert drawn == [found]
    assert measured == ["first:1", "second:1"]
    assert found == read_results(made.out / "task.json")
    assert found.original == Original(made.task_key, 1000, {"score": 2.0})
    assert [point.size_bytes for point in found.points] == [90, 90]


def test_results_are_on_disk_after_each_point(bench, monkeypatch):
    made, _ = bench
    whole = Bench.measure

    def stopped(self, run, threads):
        if run == SECOND:
            raise KeyboardInterrupt
        return whole(self, run, threads)

    monkeypatch.setattr(Bench, "measure", stopped)
    monkeypatch.setattr(runs, "SIDE_BY_SIDE", 1)
    with pytest.raises(KeyboardInterrupt):
        run_all([made], [FIRST, SECOND], nobody, nobody)
    assert [point.peer for point in read_results(made.out / "task.json").points] == ["first"]


def test_two_peers_are_measured_side_by_side_and_settings_of_one_after_another(bench, monkeypatch):
    made, measured = bench
    whole, met = Bench.measure, Barrier(2)
    busy: list[str] = []

    def together(self, run, threads):
        assert run.peer.name not in busy
        busy.append(run.peer.name)
        # Both peers are here at the same time, twice, or this is a BrokenBarrierError.
        met.wait(timeout=20)
        point = whole(self, run, threads)
        busy.remove(run.peer.name)
        return point

    monkeypatch.setattr(Bench, "measure", together)
    wanted = [Run(run.peer, setting) for run in (FIRST, SECOND) for setting in ("1", "2")]
    drawn = []
    (found,) = run_all([made], wanted, nobody, drawn.append)
    assert sorted(measured[:2]) == ["first:1", "second:1"]
    assert sorted(measured[2:]) == ["first:2", "second:2"]
    assert drawn == [found] == [read_results(made.out / "task.json")]
    assert {(point.peer, point.setting) for point in found.points} == {(run.peer.name, run.setting) for run in wanted}
    assert made.missing(wanted) == []


@pytest.mark.parametrize(("asked", "threads"), [([FIRST], "8"), ([FIRST, SECOND], "4")])
def test_cores_are_shared_by_what_is_measured_at_a_time(bench, monkeypatch, asked, threads):
    made, _ = bench
    whole, told = Bench.measure, []

    def measure(self, run, threads):
        told.append(threads)
        return whole(self, run, threads)

    monkeypatch.setattr(Bench, "measure", measure)
    monkeypatch.setattr(runs.joblib, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_all([made], asked, nobody, nobody)
    assert told == [threads] * len(asked)
    assert f"{threads} threads" in results.machine(threads)
    # Whoever asks for other threads gets these.
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(runs, "source_digest", lambda: "another")
    run_all([made], asked, nobody, nobody)
    assert told[len(asked) :] == ["3"] * len(asked)


def test_what_changed_is_measured_again(bench, monkeypatch):
    made, measured = bench
    run_all([made], [FIRST], nobody, nobody)
    monkeypatch.setattr(runs, "source_digest", lambda: "another")
    (found,) = run_all([made], [FIRST], nobody, nobody)
    assert measured == ["first:1"] * 2
    assert len(found.points) == 1
    changed = Bench(made.spec, made.out, made.work)
    Path(made.spec).write_text("# another task\n")
    run_all([changed], [FIRST], nobody, nobody)
    assert measured == ["first:1"] * 3


def test_a_peer_that_fails_is_told_and_tried_again(tmp_path, monkeypatch):
    task = tmp_path / "task.py"
    task.write_text("")
    made = Bench(str(task), tmp_path / "out", tmp_path / "work")
    monkeypatch.setattr(Bench, "scored", lambda self: Results("task", Original(self.task_key, 9, {"score": 1.0})))
    lines = []
    (found,) = run_all([made], [FIRST], lines.append, nobody)
    assert "has no function" in found.points[0].error
    assert "failed: " in lines[-1]
    assert found.good == []
    assert made.missing([FIRST]) == [FIRST]


def test_a_peer_that_cannot_be_installed_says_what_pip_said(tmp_path, monkeypatch):
    def refuse(command, **_keywords):
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no matching distribution\n")

    monkeypatch.setattr(environments.subprocess, "run", refuse)
    with pytest.raises(UnsupportedError, match=r"mine cannot be installed.*no matching distribution"):
        environments.python_of(tmp_path, "mine", ("nothing==1",))
    assert str(environments.python_of(tmp_path, "mine", ())) == sys.executable


def test_an_environment_is_made_once_and_has_its_own_packages_first(tmp_path, monkeypatch):
    calls = []
    run = subprocess.run

    def install(command, **_keywords):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments.subprocess, "run", install)
    python = environments.python_of(tmp_path, "mine", ("some==1",))
    assert environments.python_of(tmp_path, "mine", ("some==1",)) == python
    assert environments.python_of(tmp_path, "mine", ("some==2",)) != python
    assert len(calls) == 2
    assert "some==1" in calls[0]
    code = "import sys, factorpack; print(*sys.path, sep='\\n')"
    found = run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    own = next(place for place, path in enumerate(found) if str(tmp_path) in path)
    assert own < max(place for place, path in enumerate(found) if path.endswith("site-packages"))


def test_a_task_that_is_no_file_is_an_error(tmp_path):
    with pytest.raises(TaskError, match="no task file"):
        _ = Bench(str(tmp_path / "none.py"), tmp_path).task_key
    (tmp_path / "out.json").write_text("{")
    with pytest.raises(UnsupportedError, match="holds no results"):
        read_results(tmp_path / "out.json")


def test_a_command_measures_in_processes_and_draws(digits_task, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("constriction")
    monkeypatch.chdir(tmp_path)
    # No package is installed here: the peer runs with the tests' own.
    monkeypatch.setitem(registry.PEERS, "uniform", replace(registry.PEERS["uniform"], requirements=()))
    monkeypatch.setattr(runs, "WRAPPER", ())
    monkeypatch.setattr(
        runs, "WRAP", "import sys, zlib, pathlib; print(len(zlib.compress(pathlib.Path(sys.argv[1]).read_bytes())))"
    )
    done = CliRunner().invoke(app, ["bench", str(digits_task.path), "--peers", "uniform:0.1", "--out", "out", "--json"])
    assert done.exit_code == 0, done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])["tasks"]
    (point,) = found["points"]
    assert point["error"] == ""
    assert 0 < point["bytes"] < found["original"]["bytes"] == digits_task.size_bytes
    assert point["scores"]["accuracy"] == pytest.approx(digits_task.scores["accuracy"], abs=3)
    assert point["commit"] == results.commit()
    assert point["command"].endswith("--peers uniform:0.1 --out out")
    assert (tmp_path / "out" / "digits_task.png").read_bytes().startswith(b"\x89PNG")
    assert point["command"] in (tmp_path / "out" / "digits_task.html").read_text()


def test_an_unknown_peer_is_one_line(tmp_path):
    found = CliRunner().invoke(app, ["bench", "task.py", "--peers", "nobody", "--out", str(tmp_path)])
    assert found.exit_code == 1
    assert "there is no peer 'nobody': choose of all, factorpack" in found.stderr
