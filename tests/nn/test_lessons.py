"""Lessons: what is held out never comes again, and an epoch is taken up in its middle."""

from collections.abc import Iterator

import pytest
import torch

from factorpack.errors import TaskError
from factorpack.nn.lessons import EXCHANGED, Course, Held, batches_in, exchanged, hold_out, samples_in


def shuffled(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """64 batches of 4 numbered samples."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(epoch))
    return ((part[:, None].float(), part) for part in order.split(4))


def seen(course: Course, batches: int) -> list[int]:
    return [int(sample) for _ in range(batches) for sample in next(course)[1]]


def test_what_is_held_out_does_not_come_again() -> None:
    held = hold_out(shuffled)
    assert batches_in(shuffled) == 64
    assert len(held.lessons) == 4
    apart = {int(sample) for _, targets in held.lessons for sample in targets}
    course = Course(shuffled, held)
    found: set[int] = set()
    while course.epoch < 3:
        batch, targets = next(course)
        assert torch.equal(batch[:, 0].long(), targets)
        found |= set(targets.tolist())
    assert len(apart) == 16
    assert found == set(range(256)) - apart


def test_at_most_sixteen_batches_are_held_out() -> None:
    assert len(hold_out(lambda _: ((torch.tensor([[float(n)]]), None) for n in range(1000))).lessons) == 16
    assert len(hold_out(lambda _: ((torch.tensor([[float(n)]]), None) for n in range(2))).lessons) == 1


def test_a_course_is_taken_up_where_it_was_left() -> None:
    held = hold_out(shuffled)
    whole = Course(shuffled, held)
    seen(whole, 70)
    epoch, place = whole.epoch, whole.place
    assert epoch == 1
    assert seen(Course(shuffled, held, epoch, place), 100) == seen(whole, 100)


def test_processes_share_the_batches_of_an_epoch() -> None:
    held = hold_out(shuffled)
    whole = seen(Course(shuffled, held), 40)
    parts = [Course(shuffled, held, processes=2, process=process) for process in range(2)]
    together = [sample for _ in range(20) for part in parts for sample in next(part)[1].tolist()]
    assert together == whole


def padded(sentences: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, sentences))
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sentences])
    return {"input_ids": torch.tensor([s + [0] * (width - len(s)) for s in sentences]), "attention_mask": mask}


def test_a_sentence_is_the_same_with_other_padding() -> None:
    epochs = [
        [padded([[5, 6], [7]]), padded([[8, 9, 1]])],
        [padded([[8, 9, 1], [7]]), padded([[5, 6], [4, 4]])],
    ]
    held = hold_out(lambda _: ((batch, None) for batch in epochs[0]))
    course = Course(lambda epoch: ((batch, None) for batch in epochs[epoch]), held, epoch=1)
    first, second = next(course)[0], next(course)[0]
    assert first["input_ids"].tolist() == [[8, 9, 1]]
    assert second["input_ids"].tolist() == [[4, 4]]
    assert samples_in(first) == 1


@pytest.mark.parametrize(
    ("training", "told"),
    [
        (lambda _: iter(()), "0 batches"),
        (lambda _: iter([(torch.ones(1), None)]), "1 batches"),
        (lambda _: iter([torch.ones(2), torch.ones(2)]), "pairs"),
    ],
)
def test_lessons_that_cannot_be_used_are_refused(training, told) -> None:
    with pytest.raises(TaskError, match=told):
        hold_out(training)


def test_an_epoch_that_is_all_held_out_is_refused() -> None:
    held = hold_out(shuffled)
    course = Course(lambda _: iter(held.lessons), held)
    with pytest.raises(TaskError, match="held out"):
        next(course)


def test_what_is_held_out_is_of_an_epoch_of_its_own() -> None:
    """Epoch 0 is drawn with the seed that calibration is often drawn with."""
    apart = {int(sample) for _, targets in hold_out(shuffled).lessons for sample in targets}
    first = seen(Course(shuffled, Held([], frozenset())), 4)
    assert apart != set(first)


def test_tokens_are_exchanged_for_others_of_the_batch() -> None:
    ids = torch.arange(1000, 3000).reshape(4, 500)
    shares = []
    for number in range(50):
        found = exchanged(ids, number)
        assert found.dtype == ids.dtype
        assert torch.isin(found, ids).all()
        assert torch.equal(found, exchanged(ids, number))
        shares.append((found != ids).double().mean().item())
    assert max(shares) <= EXCHANGED + 0.05
    assert max(shares) > 0.6 * EXCHANGED
    assert min(shares) < 0.2 * EXCHANGED
    assert ids.reshape(-1).tolist() == list(range(1000, 3000))


def test_padding_stays_and_goes_nowhere() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 0, 0, 0]] * 3),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]] * 3),
        "token_type_ids": torch.arange(24).reshape(3, 8),
    }
    changed = 0
    for number in range(100):
        found = exchanged(batch, number)
        assert torch.equal(found["input_ids"] == 0, batch["attention_mask"] == 0)
        assert found["attention_mask"] is batch["attention_mask"]
        assert found["token_type_ids"] is batch["token_type_ids"]
        changed += int((found["input_ids"] != batch["input_ids"]).sum())
    assert changed > 0


def test_what_comes_with_tokens_stays() -> None:
    ids, times = torch.arange(100)[None], torch.randn(1, 100)
    found = exchanged((ids, times), 1)
    assert isinstance(found, tuple)
    assert found[1] is times
    assert not torch.equal(found[0], ids)


@pytest.mark.parametrize(
    "batch",
    [torch.randn(2, 3), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), (torch.randn(2), torch.arange(2)),
     {"pixels": torch.arange(4)}, torch.zeros(0, dtype=torch.int64), ()],
)  # fmt: skip
def test_what_is_no_text_is_left_as_it_is(batch) -> None:
    assert exchanged(batch, 1) is batch
