"""Bytes do not depend on where parts are computed: here, in processes, on a cluster of which a worker is killed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from factorpack import Options, UnsupportedError, WorkerError, compress, workers
from factorpack.cli import app
from factorpack.errors import BudgetError
from factorpack.pipeline import Source, one_thread, silent
from factorpack.search import pack
from factorpack.task import load_task
from factorpack.workers import ALONE, working

SIZE = 6000
PROCESSES = Path("/proc/self/stat").exists()
SOURCES = str(Path(workers.__file__).resolve().parents[1])


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([SOURCES, os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def source(digits_task) -> Source:
    task = load_task(str(digits_task.path))
    return Source(task.model(), task.calibration()[:3], task.output)


@pytest.fixture(scope="module")
def two():
    with working(2, "") as found:
        yield found


def packed(source: Source, form: str, by, progress=silent) -> bytes:
    # Codebooks of large layers take long and show nothing that small ones do not.
    options = Options(form, exclude=("convolutions.2.weight",) if form == "vq" else ())
    size = 50_000 if form == "vq" else SIZE
    with one_thread():
        return pack(source.state(options, workers=by), size, options, progress, workers=by).data


@pytest.fixture(scope="module")
def alone(source):
    """The bytes of one job, by form."""
    return cache(lambda form: packed(source, form, ALONE))


@pytest.mark.parametrize("form", ["auto", "direct", "sparse_pca", "svd", "vq", "separable"])
def test_two_processes_give_the_bytes_of_one(source, two, alone, form):
    assert packed(source, form, two) == alone(form)


def test_three_jobs_give_the_bytes_of_one(source, alone):
    with working(3, "") as three:
        assert three.threads == 3
        assert packed(source, "auto", three) == alone("auto")


def test_rows_are_rounded_by_processes_too(source, two, alone, monkeypatch):
    """The layers here are too small to be cut otherwise."""
    whole = alone("direct")
    monkeypatch.setattr("factorpack.solve.sequential.ROWS_AT_ONCE", 8 * 5)
    sent = []

    def counted(function, shared, items):
        items = list(items)
        sent.append((function.__name__, len(items)))
        return two.map(function, shared, items)

    assert packed(source, "direct", workers.Workers(counted, 2)) == whole
    assert ("_round_part", 7) in sent, "32 outputs, 5 at a time"
    assert ("_drift_losses", 2) in sent


def test_python_takes_jobs_without_data_too(digits_network):
    one, many = (compress(digits_network, SIZE, options=Options(jobs=jobs)) for jobs in (1, 2))
    assert one.data == many.data


@pytest.mark.skipif(not PROCESSES, reason="processes are found in /proc")
def test_no_process_is_left():
    before = children(os.getpid())
    with working(2, "") as by:
        pids = set(by.map(own_pid, None, range(8)))
        assert pids <= children(os.getpid())
    assert not pids & children(os.getpid())
    assert len(children(os.getpid())) <= len(before) + 1, "loky's tracker of resources alone may stay"


def own_pid(_shared, _item):
    return os.getpid()


def refused(_shared, item):
    raise BudgetError(f"{item} cannot be met")


def doubled(shared, item):
    return shared + 2 * item


def ended(_shared, _item):
    os._exit(9)


def test_results_come_in_the_order_of_the_items(two):
    assert [int(found.sum()) for found in two.map(doubled, np.ones(3), (np.full(3, i) for i in range(20)))] == [
        3 + 6 * i for i in range(20)
    ]
    assert list(two.map(doubled, 1, [])) == []


def waiting_for_the_last(folder: Path, item: int) -> bool:
    """The first part waits until the last one has begun."""
    last = folder / "last"
    if item == 19:
        last.touch()
    until = time.monotonic() + 30
    while item == 0 and not last.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return item > 0 or last.exists()


def test_a_long_part_that_comes_first_keeps_no_other_waiting(two, tmp_path):
    assert all(two.map(waiting_for_the_last, tmp_path, range(20)))


def test_a_worker_s_error_is_that_of_one_process(two):
    # Of several that fail the first to be heard of counts.
    with pytest.raises(BudgetError, match="^[0-3] cannot be met$"):
        list(two.map(refused, None, range(4)))
    assert list(two.map(doubled, 1, range(3))) == [1, 3, 5], "and the workers go on"


def test_large_parts_go_by_files_that_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    large = np.ones(workers.SENT)
    with working(2, "") as by:
        found = list(by.map(doubled, large, (np.full(workers.SENT, i) for i in range(3))))
        assert [float(one.mean()) for one in found] == [1, 3, 5]
        (folder,) = tmp_path.iterdir()
        assert not list(folder.iterdir())
        shutil.rmtree(folder)
        with pytest.raises(
            WorkerError, match="cannot be written to .*: make room there, or name another place in TMPDIR$"
        ):
            list(by.map(doubled, large, range(3)))
    assert not list(tmp_path.iterdir())


def test_a_lost_process_is_told_of():
    with pytest.raises(WorkerError, match="a worker process was ended, .* ask for fewer --jobs$"), working(2, "") as by:
        list(by.map(ended, None, range(4)))


@pytest.mark.parametrize(("jobs", "cluster", "message"), [(0, "", "--jobs is"), (1, "here:1", "as tcp://HOST:PORT")])
def test_what_cannot_be_is_refused(jobs, cluster, message):
    with pytest.raises(UnsupportedError, match=message):
        Options(jobs=jobs, cluster=cluster)


def test_a_cache_is_of_any_number_of_jobs(source):
    from factorpack.cache import key_of

    assert key_of(source, Options(jobs=2, cluster="tcp://127.0.0.1:1")) == key_of(source, Options())
    assert key_of(source, Options(seed=1)) != key_of(source, Options())


def children(parent: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


@pytest.mark.skipif(not PROCESSES, reason="processes are found in /proc")
def test_an_interrupt_ends_the_workers(digits_task, tmp_path):
    # So slow that the interrupt comes before the end on any machine.
    slow = Path(digits_task.path).with_name("slow.py")
    slow.write_text(
        "import time\nfrom digits_task import *\nfrom digits_task import model as quick\n\n\ndef model():\n"
        "    network = quick()\n    network.register_forward_pre_hook(lambda *_: time.sleep(2))\n    return network\n"
    )
    arguments = ["compress", str(slow), "--size", "6KB", "--jobs", "2", "--form", "vq"]
    # What a shell without job control starts in the background ignores interrupts, and so would this.
    heeded = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heeded}; from factorpack.cli import main; main()"
    run = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "m.fpk")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(children(run.pid)) < 2 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    begun = children(run.pid)
    os.killpg(run.pid, signal.SIGINT)
    _, told = run.communicate(timeout=60)
    assert run.returncode == 130, told
    assert "stopped; a file is written complete or not at all" in told
    assert "Traceback" not in told
    assert len(begun) >= 2
    for _ in range(100):
        if not any(Path(f"/proc/{worker}").exists() for worker in begun):
            break
        time.sleep(0.1)
    assert not [worker for worker in begun if Path(f"/proc/{worker}").exists()]
    assert not list(tmp_path.iterdir())


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_a_cluster_that_is_not_there_is_an_error_of_one_line(digits_task, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="Dask is missing: pip install factorpack[cluster]")
    monkeypatch.setattr(workers, "CONNECTING", 1)
    address = f"tcp://127.0.0.1:{free_port()}"
    arguments = ["compress", str(digits_task.path), "--size", "6KB", "--cluster", address]
    found = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "m.fpk")])
    assert found.exit_code == 1
    assert found.stderr.strip() == (
        f"error: no Dask scheduler answers at {address}: start one (dask scheduler), or correct --cluster"
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a scheduler, and its two workers, on this machine's loopback."""
    pytest.importorskip("distributed", reason="Dask is missing: pip install factorpack[cluster]")
    folder = tmp_path_factory.mktemp("cluster")
    address = f"tcp://127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    begun = []

    def start(module: str, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments, "--no-dashboard"]
        with (folder / f"{len(begun)}.log").open("w") as log:
            begun.append(subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log))
        return begun[-1]

    try:
        start("dask_scheduler", "--host", "127.0.0.1", "--port", port)
        alike = ("--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--local-directory", str(folder))
        yield address, [start("dask_worker", address, *alike) for _ in range(2)]
    finally:
        for process in reversed(begun):
            process.kill()
            process.wait()


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr(workers, "CONNECTING", 60)


def test_another_version_on_the_cluster_is_refused(cluster, monkeypatch, patient):
    monkeypatch.setattr(workers, "__version__", "9.9")
    with (
        pytest.raises(WorkerError, match=r"has factorpack \d.*, here is factorpack 9\.9.*: install the same there"),
        working(1, cluster[0]),
    ):
        pass


def test_a_worker_s_error_comes_through_the_cluster(cluster, patient):
    # Workers find functions by name, and have the package alone.
    with working(1, cluster[0]) as by, pytest.raises(UnsupportedError, match="^--jobs is how many cores are used"):
        list(by.map(workers.check_jobs, -1, ["", ""]))


def test_a_cluster_gives_the_same_bytes_though_a_worker_is_killed(source, alone, cluster, patient):
    address, processes = cluster
    told = []

    def progress(stage: str, done: int, _total: int) -> None:
        told.append(stage)
        if stage == "rounding" and done == 2:
            processes[0].kill()

    with working(2, address) as by:
        assert packed(source, "auto", by, progress) == alone("auto")
    assert processes[0].wait(10) == -signal.SIGKILL
    assert processes[1].poll() is None
    assert "rounding behind the prefix" in told
