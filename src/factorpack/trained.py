"""Composition: a compressed file as a network that can be trained, and back to a file."""

from functools import partial
from pathlib import Path

from torch import nn

from factorpack.coding.records import price_codes
from factorpack.container import Contents, read, to_bytes, write
from factorpack.errors import BudgetError
from factorpack.nn.trainable import TrainableModel

PRICED_RADIUS = 31
"""Integers beyond cost what the outermost of these does."""
LARGEST_THRESHOLD = 1.0
"""In steps: codes below this part of a step may become zero to meet a size, at most."""
BISECTIONS = 6


def trainable(model: nn.Module, path: str | Path) -> TrainableModel:
    """A file as a network that can be trained: latents in place of its integers, gradients straight through rounding.

    `model` is of the same architecture; it becomes part of what is returned, and `save` writes that to a file again.
    Raises FormatError for a damaged file, MismatchError for a file of another model.

    Examples:
        >>> compressed = factorpack.trainable(build_model(), "model.fpk")
        >>> optimizer = torch.optim.AdamW(compressed.parameters(), lr=0.01, weight_decay=0)
        >>> loss = torch.nn.functional.cross_entropy(compressed(inputs), targets)
        >>> loss.backward()
        >>> _ = optimizer.step()
        >>> factorpack.save(compressed, "trained.fpk")
    """
    contents, _ = read(Path(path))
    return trainable_of(model, contents)


def trainable_of(model: nn.Module, contents: Contents) -> TrainableModel:
    """As `trainable`, of what is in a file."""
    pricer = partial(price_codes, radius=PRICED_RADIUS)
    return TrainableModel(model, contents.tensors, contents.dtypes, contents.aliases, pricer)


def at_rest(model: TrainableModel, threshold: float = 0.5) -> Contents:
    """What the file of a model in training has in it, codes below `threshold` steps left out."""
    return Contents(model.factored(threshold), model.dtypes, model.aliases)


def written(model: TrainableModel, threshold: float = 0.5) -> tuple[bytes, Contents]:
    """That file, and what is in it."""
    contents = at_rest(model, threshold)
    return to_bytes(contents), contents


def trimmed(model: TrainableModel, size: int) -> tuple[bytes, Contents]:
    """As `written`, for a model that is too large, with as few codes left out as bring it to at most `size` bytes.

    Raises BudgetError where those below one step are not enough.
    """
    low, high = 0.5, LARGEST_THRESHOLD
    found = written(model, high)
    if len(found[0]) > size:
        raise BudgetError(
            f"{size:,} bytes cannot be met: the trained model takes {len(found[0]):,} bytes with all codes below one "
            f"step left out; give bits() more weight in the loss, start from a smaller file, or ask for more"
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tried = written(model, middle)
        if len(tried[0]) <= size:
            found, high = tried, middle
        else:
            low = middle
    return found


def save(model: TrainableModel, path: str | Path, size: int | None = None) -> None:
    """Writes a trained model as a file, complete or not at all; of at most `size` bytes where that is given.

    The file decodes to the very tensors that the model computes with, where it need not be made smaller: for that,
    codes that are nearest to zero are left out, which costs much where many are. Raises BudgetError where that is not
    enough.

    Examples:
        >>> compressed = factorpack.trainable(build_model(), "model.fpk")
        >>> factorpack.save(compressed, "trained.fpk")
    """
    data, _ = written(model)
    if size is not None and len(data) > size:
        data, _ = trimmed(model, size)
    write(Path(path), data)
