"""Where independent parts are computed: in this process, in worker processes of this machine, or on a Dask cluster.

Every place computes the same parts with one thread each and hands back what they give in their order, so that bytes do
not depend on the place. Parts travel as arrays of bytes: large ones are in files that processes map; Dask's
scheduler keeps all of them, so that what a lost worker had is computed again elsewhere.
"""

import pickle
import platform
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from factorpack import __version__
from factorpack.errors import UnsupportedError, WorkerError
from factorpack.solve.sequential import Map, in_turn

CONNECTING = 10
"""Seconds that a scheduler and its first worker may take to answer."""
AHEAD = 2
"""Parts a worker that are on their way at a time: more would only take memory. Those that are done do not count, or
all would wait for a large one that came first."""
IDLE = 300
"""Seconds after which a process that has nothing to do ends; it begins again with the next part."""
SENT = 1 << 20
"""So many bytes go through a pipe; more of them to a file, which is there for several parts."""
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
"""What libraries read their number of threads from when they are loaded."""


@dataclass(frozen=True, eq=False)
class Workers:
    """`map` computes parts somewhere and gives their results in order; `threads` of this process run networks."""

    map: Map = in_turn
    threads: int = 1


ALONE = Workers()


def _packed(value: object) -> np.ndarray:
    return np.frombuffer(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), np.uint8)


def _compute(function: Callable[[Any, Any], Any], shared: np.ndarray | Path, item: np.ndarray | Path) -> np.ndarray:
    """In a worker: one part, with one thread as everywhere; what is handed over may be in files."""
    torch.set_num_threads(1)
    return _packed(function(_unpacked(shared), _unpacked(item)))


def _unpacked(handed: np.ndarray | Path) -> Any:
    return pickle.loads((np.memmap(handed, np.uint8, "r") if isinstance(handed, Path) else handed).data)


def check_jobs(jobs: int, cluster: str) -> None:
    """Raises UnsupportedError for no number of jobs, or what is no address of a scheduler."""
    if jobs < 1:
        raise UnsupportedError(f"--jobs is how many cores are used: one or more, not {jobs}")
    if cluster and "://" not in cluster:
        raise UnsupportedError(f"--cluster is the address of a Dask scheduler, as tcp://HOST:PORT, not {cluster!r}")


@contextmanager
def working(jobs: int, cluster: str) -> Iterator[Workers]:
    """Workers for a while: `jobs` processes, or those of a Dask cluster; `jobs` threads run networks here.

    Raises UnsupportedError where Dask is missing, WorkerError where the cluster cannot be reached, has another
    version, or loses its workers.
    """
    if cluster:
        with _clustered(cluster) as spread:
            yield Workers(_unless_alone(spread), jobs)
    elif jobs > 1:
        with _processes(jobs) as spread:
            yield Workers(_unless_alone(spread), jobs)
    else:
        yield ALONE


def _unless_alone(spread: Map) -> Map:
    """A part without others is computed here: to send it would gain nothing."""

    def mapped(function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]) -> Iterable[Any]:
        rest = iter(items)
        first = list(islice(rest, 2))
        return spread(function, shared, chain(first, rest)) if len(first) > 1 else in_turn(function, shared, first)

    return mapped


@contextmanager
def _processes(jobs: int) -> Iterator[Map]:
    # The executor alone: joblib.Parallel polls for results, and clears a folder away after each call, a tenth of all.
    from joblib.externals.loky import ProcessPoolExecutor
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    with TemporaryDirectory(prefix="factorpack-") as folder:
        executor = ProcessPoolExecutor(jobs, timeout=IDLE, env=dict.fromkeys(THREADS, "1"))
        names = map(Path(folder).joinpath, map(str, count()))

        def handed(packed: np.ndarray) -> np.ndarray | Path:
            if packed.nbytes <= SENT:
                return packed
            try:
                packed.tofile(path := next(names))
            except OSError as error:
                raise WorkerError(
                    f"what processes share cannot be written to {folder} ({error}): make room there, or name another "
                    f"place in TMPDIR"
                ) from error
            return path

        def spread(function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]) -> Iterator[Any]:
            common = handed(_packed(shared))

            def submit(packed: np.ndarray) -> Any:
                item = handed(packed)
                begun = executor.submit(_compute, function, common, item)
                begun.add_done_callback(lambda _: _removed(item))
                return begun

            try:
                yield from _in_order(submit, wait, items, AHEAD * jobs)
            finally:
                _removed(common)

        try:
            with _interrupts_ignored():
                # All processes begin with the first parts, and load what they need meanwhile.
                begun = [executor.submit(_kept, _packed(None)) for _ in range(jobs)]
            for one in begun:
                one.result()
            yield spread
        except TerminatedWorkerError as error:
            raise WorkerError(
                "a worker process was ended, most likely for want of memory: ask for fewer --jobs"
            ) from error
        finally:
            # Else a process that is a child of another would wait for them.
            executor.shutdown(kill_workers=True)


def _removed(handed: np.ndarray | Path) -> None:
    if isinstance(handed, Path):
        # Where a file in use cannot be removed it is with its folder.
        with suppress(OSError):
            handed.unlink()


def _in_order(
    submit: Callable[[np.ndarray], Any], wait: Callable[..., Any], items: Iterable[Any], ahead: int
) -> Iterator[Any]:
    """What `submit` gives futures of for each of the items, in their order.

    So many are on their way at a time; `wait(futures, return_when="FIRST_COMPLETED")` waits for one of them.
    """
    begun: deque[Any] = deque()
    for item in items:
        begun.append(submit(_packed(item)))
        while len(busy := [future for future in begun if not future.done()]) >= ahead:
            wait(busy, return_when=FIRST_COMPLETED)
        while begun and begun[0].done():
            yield pickle.loads(begun.popleft().result().data)
    while begun:
        yield pickle.loads(begun.popleft().result().data)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that begin in here ignore a Ctrl-C: it is for this one, which then ends them, without their noise.

    Of threads only the main one may say so. A signal mask would not do: Python's resource tracker takes it off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def _kept(shared: np.ndarray) -> np.ndarray:
    return shared


def _versions() -> tuple[str, str, str]:
    """What makes bytes differ, as far as versions do."""
    return __version__, torch.__version__, platform.machine()


@contextmanager
def _clustered(address: str) -> Iterator[Map]:
    try:
        import dask
        from distributed import CancelledError, Client, KilledWorker
        from distributed import wait as wait_there
        from distributed.comm.core import CommClosedError
    except ImportError as error:
        raise UnsupportedError("--cluster needs Dask: pip install factorpack[cluster]") from error
    # Everything goes by the scheduler on purpose: see the head of this module.
    quiet = {"distributed.admin.large-graph-warning-threshold": "1TB"}
    with dask.config.set(quiet), _connected(Client, address) as client:
        ahead = AHEAD * max(sum(client.nthreads().values()), 1)

        def spread(function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]) -> Iterator[Any]:
            common = client.submit(_kept, _packed(shared), pure=False)

            def submit(item: np.ndarray) -> Any:
                return client.submit(_compute, function, common, item, pure=False)

            def waited(futures: list[Any], return_when: str) -> None:
                with client.as_current():
                    wait_there(futures, return_when=return_when)  # type: ignore[no-untyped-call]

            yield from _in_order(submit, waited, items, ahead)

        try:
            yield spread
        except (KilledWorker, CancelledError, CommClosedError) as error:
            raise WorkerError(
                f"the cluster at {address} lost its workers or its scheduler ({error}): see that it runs, with enough "
                f"memory, and start again"
            ) from error


@contextmanager
def _connected(client_type: Any, address: str) -> Iterator[Any]:
    """A client of a cluster whose workers are like this process."""
    try:
        client = client_type(address, timeout=CONNECTING, set_as_default=False)
    except (OSError, ValueError) as error:
        raise WorkerError(
            f"no Dask scheduler answers at {address}: start one (dask scheduler), or correct --cluster"
        ) from error
    try:
        _check_workers(client, address)
        yield client
    finally:
        client.close()


def _check_workers(client: Any, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=CONNECTING)
    except TimeoutError as error:
        raise WorkerError(f"the cluster at {address} has no worker: start some (dask worker {address})") from error
    try:
        found = client.run(_versions)
    except Exception as error:
        raise WorkerError(
            f"the workers at {address} cannot load factorpack ({error}): install factorpack {__version__} there"
        ) from error
    for worker, versions in found.items():
        if tuple(versions) != _versions():
            here, there = (f"factorpack {own}, torch {of} on {machine}" for own, of, machine in (_versions(), versions))
            raise WorkerError(f"the worker {worker} has {there}, here is {here}: install the same there")
