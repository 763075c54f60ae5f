"""Several tensors at once are what one after another are, in order, in memory and in what is refused."""

import threading
from bisect import bisect

import laws
import pytest
import torch

import factorpack
from factorpack import threads
from factorpack.container import Contents, read, to_bytes, write
from factorpack.errors import FormatError
from factorpack.threads import in_threads


def test_results_keep_their_order_and_the_largest_is_begun_first():
    begun, together = [], threading.Barrier(2, timeout=60)

    def work(size):
        begun.append(size)
        if len(begun) <= 2:
            # Only two at once get past this.
            together.wait()
        return 10 * size

    sizes = [1, 3, threads.ENTRIES_A_THREAD, 2]
    assert in_threads(work, sizes, lambda size: size, 2) == [10 * size for size in sizes]
    assert set(begun[:2]) == {threads.ENTRIES_A_THREAD, 3}


@pytest.mark.parametrize(("most", "size"), [(1, threads.ENTRIES_A_THREAD), (8, 10)])
def test_one_thread_is_the_callers(most, size):
    found = in_threads(lambda _: threading.current_thread(), range(4), lambda _: size, most)
    assert found == [threading.current_thread()] * 4


@pytest.mark.parametrize("most", [1, 3])
def test_the_first_that_fails_is_told(most, monkeypatch):
    monkeypatch.setattr(threads, "ENTRIES_A_THREAD", 1)

    def work(item):
        if item >= 2:
            raise ValueError(item)
        return item

    with pytest.raises(ValueError, match="^2$"):
        in_threads(work, range(6), lambda item: item, most)


@pytest.fixture
def contents():
    tensors = dict(laws.weights(0))
    return Contents(tensors, dict.fromkeys(tensors, "float32"), {})


def test_a_file_is_read_and_recombined_alike_in_any_number_of_threads(contents, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "ENTRIES_A_THREAD", 1)
    write(path := tmp_path / "model.fpk", to_bytes(contents))
    one, bill = read(path)
    several, its_bill = read(path, threads=4)
    laws.assert_same_contents(several, one)
    assert list(several.tensors) == list(one.tensors)
    assert its_bill == bill
    alone, threads_before = [], torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            alone.append(factorpack.load_state_dict(path))
    finally:
        torch.set_num_threads(threads_before)
    assert list(alone[0]) == list(alone[1])
    assert all(torch.equal(alone[0][name], alone[1][name]) for name in alone[0])


def test_threads_share_what_a_file_may_take(contents, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "ENTRIES_A_THREAD", 1)
    write(path := tmp_path / "model.fpk", to_bytes(contents))

    def refused(most_bytes, count):
        try:
            read(path, most_bytes, threads=count)
        except FormatError:
            return True
        return False

    enough = next(2**power for power in range(40) if not refused(2**power, 1))
    least = bisect(range(enough), False, key=lambda most: not refused(most, 1))
    assert not refused(least, 4)
    assert refused(least - 1, 4)
