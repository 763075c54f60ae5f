"""A recipe: ResNet-20 on CIFAR-10 at 40 kB, compressed and then trained end to end, 60 minutes on two cores.

    python examples/finetune_resnet20.py ../shared/tasks/resnet20_cifar10.py

The task is a Python file with model(), calibration(), evaluate(model) and training(epoch); the latter yields pairs of
a batch and its targets, which are None here: the file learns from the original network.
"""

import argparse

import factorpack
from factorpack.task import load_task

SIZE = 40_000
MINUTES = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    arguments = parser.parse_args()
    task = load_task(arguments.task)

    packed = factorpack.compress(task.model(), SIZE, task.calibration(), task.evaluate, output="logits")
    packed.save("resnet20.fpk")
    print(f"before training: {packed.report.size_bytes:,} bytes, {dict(packed.report.scores)}")

    lessons = factorpack.Lessons(task.training, output="logits")
    options = factorpack.TrainingOptions(size=SIZE, minutes=arguments.minutes)
    report = factorpack.finetune(task.model(), "resnet20.fpk", "resnet20-trained.fpk", lessons, options, task.evaluate)
    print(f"after {report.steps} steps: {report.size_bytes:,} bytes, {dict(report.scores)}")


if __name__ == "__main__":
    main()
