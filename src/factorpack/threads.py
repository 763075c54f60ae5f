"""Several tensors at once, in threads: machine code and NumPy do most of the work without Python's lock."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

ENTRIES_A_THREAD = 1 << 21
"""Entries of tensors, to decode or to recombine, that another thread is worth it for."""

Item = TypeVar("Item")
Found = TypeVar("Found")


def in_threads(
    work: Callable[[Item], Found], items: Iterable[Item], entries: Callable[[Item], int], threads: int
) -> list[Found]:
    """`work` of each of `items`, in their order, the largest begun first.

    `entries` tells how large each is, and `threads` how many there are at most: one where all are small. What is
    raised for the first of the items that fail is raised.
    """
    given = list(items)
    sizes = [entries(item) for item in given]
    threads = min(threads, len(given), 1 + sum(sizes) // ENTRIES_A_THREAD)
    if threads < 2:
        return [work(item) for item in given]
    order = sorted(range(len(given)), key=sizes.__getitem__, reverse=True)
    with ThreadPoolExecutor(threads) as pool:
        begun = {index: pool.submit(work, given[index]) for index in order}
        try:
            return [begun[index].result() for index in range(len(given))]
        finally:
            for future in begun.values():
                future.cancel()
