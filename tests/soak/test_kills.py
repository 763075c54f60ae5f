"""Kills by the hundred, of compress and of finetune; what each leaves is asserted by `kills.Question.kill`."""

import time

import pytest
from kills import Processes, Question, at_any_time, compressing, finetuning, while_writing

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def processes() -> Processes:
    return Processes()


@pytest.fixture(scope="module", params=[compressing, finetuning], ids=["compress", "finetune"])
def asked(request, processes, digits_task, tmp_path_factory) -> Question:
    return request.param(processes, digits_task.path, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("when", "kills"), [("at any time", 200), ("while writing", 50)])
def test_no_kill_leaves_a_torn_file_and_each_run_goes_on_to_the_same_bytes(
    processes, asked, when, kills, tmp_path, capsys
):
    # Runs that go on are shorter than the whole.
    moments = while_writing() if when == "while writing" else at_any_time(0.7 * asked.seconds)
    began = time.monotonic()
    found = asked.kill(processes, tmp_path / "out.fpk", kills, moments)
    assert found.total() == kills
    with capsys.disabled():
        print(f"\n{asked.arguments[0]}, {kills} kills {when}, found {dict(found)}, {time.monotonic() - began:.0f} s")
