"""Work on threads: in lockstep, as several runs that pause for one another, or in order with little waiting."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from factorpack.errors import FactorpackError, TaskError

Item = TypeVar("Item")
Found = TypeVar("Found")
Pause = Callable[[Any], Any]
"""Called by a run with what it waits for; gives what it was answered."""


class _Stopped(BaseException):
    """Ends a run that nobody waits for any more."""


@dataclass(eq=False)
class Run:
    """`work`, which is given a way to pause; it goes on only between `advance` and its next pause.

    `waiting` is what it paused with, None before the first pause and when it is done.
    """

    work: Callable[[Pause], None]
    waiting: Any = None
    _answer: Any = None
    _error: BaseException | None = None
    _stopped: bool = False
    _go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _pause(self, question: Any) -> Any:
        self.waiting = question
        self._back.release()
        self._go.acquire()
        if self._stopped:
            raise _Stopped
        answer, self._answer = self._answer, None
        return answer

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._stopped:
                self.work(self._pause)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self.waiting = None
        self._back.release()

    def advance(self, answer: Any = None) -> None:
        """Goes on, with an answer to what it waits for, to the next pause or to the end.

        Raises TaskError where the work failed.
        """
        self._answer = answer
        self._go.release()
        self._back.acquire()
        if isinstance(self._error, FactorpackError):
            raise self._error
        if self._error is not None:
            raise TaskError(f"the model failed on calibration data: {self._error}") from self._error

    def stop(self) -> None:
        self._stopped = True
        self._go.release()
        self._thread.join()


@contextmanager
def running(works: Sequence[Callable[[Pause], None]]) -> Iterator[list[Run]]:
    """Runs, none of which has begun; they are ended afterwards wherever they are."""
    runs = [Run(work) for work in works]
    try:
        yield runs
    finally:
        for run in runs:
            run.stop()


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Found], items: Iterable[Item], threads: int
) -> Iterator[Found]:
    """As `pool.map`, with at most as many parts begun or waiting as there are threads: for results that are large."""
    begun: deque[Future[Found]] = deque()
    for item in items:
        if len(begun) == threads:
            yield begun.popleft().result()
        begun.append(pool.submit(work, item))
    while begun:
        yield begun.popleft().result()
