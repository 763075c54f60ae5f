"""A recipe: a language model of 260 thousand parameters at 80 kB, trained in a loop of one's own.

    python examples/finetune_stories260k.py ../shared/tasks/stories260k.py

`factorpack finetune` does the same with checkpoints, a controller of the size and a held-out slice to choose by; this
is how it goes with a loop, an optimiser and a schedule that are your own.
"""

import argparse
import math

import torch

import factorpack
from factorpack.task import load_task

SIZE = 80_000
EPOCHS = 20
REPRICED = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    task = load_task(arguments.task)
    original = task.model()

    packed = factorpack.compress(original, SIZE, task.calibration(), task.evaluate)
    packed.save("stories.fpk")
    print(f"before training: {packed.report.size_bytes:,} bytes, {dict(packed.report.scores)}")

    model = factorpack.trainable(task.model(), "stories.fpk")
    # Steps of whole weights move slower than single codes.
    steps = [parameter for name, parameter in model.named_parameters() if name.endswith("octaves")]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith("octaves")]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 0.01}, {"params": steps, "lr": 0.001}], weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    # A little below: cutting codes off afterwards to meet the size costs more than all training wins.
    goal, rate = 0.99 * model.coded_bytes(), 1e-6
    for epoch in range(arguments.epochs):
        for step, (batch, _) in enumerate(task.training(epoch)):
            if step % REPRICED == 0:
                # What a bit is worth follows the size that the coder would give the codes now.
                model.reprice()
                rate *= math.exp(20 * (model.coded_bytes() / goal - 1))
            with torch.no_grad():
                expected = original(batch).log_softmax(-1)
            loss = torch.nn.functional.kl_div(
                model(batch).log_softmax(-1), expected, log_target=True, reduction="sum"
            ) / (batch.numel())
            optimizer.zero_grad()
            loss.backward()
            model.price(rate)
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, codes {model.coded_bytes():,.0f} bytes", flush=True)

    factorpack.save(model, "stories-trained.fpk", size=SIZE)
    trained = factorpack.load("stories-trained.fpk", task.model())
    print(f"after training: {task.evaluate(trained)}")


if __name__ == "__main__":
    main()
