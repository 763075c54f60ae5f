"""A recipe: all-MiniLM-L6-v2 at 3 MB, compressed and then trained end to end, 90 minutes on two cores.

    python examples/finetune_minilm.py ../shared/tasks/minilm_sts.py

The task is a Python file with model(), calibration(), evaluate(model) and training(epoch); the latter yields pairs of
a batch and its targets, which are None here: the file learns from the original network.
"""

import argparse

import factorpack
from factorpack.task import load_task

SIZE = 3_000_000
MINUTES = 90


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    arguments = parser.parse_args()
    task = load_task(arguments.task)

    packed = factorpack.compress(task.model(), SIZE, task.calibration(), task.evaluate, output="embedding")
    packed.save("minilm.fpk")
    print(f"before training: {packed.report.size_bytes:,} bytes, {dict(packed.report.scores)}")

    lessons = factorpack.Lessons(task.training, output="embedding")
    options = factorpack.TrainingOptions(size=SIZE, minutes=arguments.minutes)
    report = factorpack.finetune(task.model(), "minilm.fpk", "minilm-trained.fpk", lessons, options, task.evaluate)
    print(f"after {report.steps} steps: {report.size_bytes:,} bytes, {dict(report.scores)}")


if __name__ == "__main__":
    main()
