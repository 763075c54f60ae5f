"""Compressed folders as ready models."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from factorpack.errors import TaskError, UnsupportedError
from factorpack.hf.folder import WEIGHTS, Folder, load_network, read_folder, require_transformers
from factorpack.hf.hook import METHOD
from factorpack.pipeline import MODES, load


def _compressed(path: str | Path) -> Folder:
    folder = read_folder(Path(path))
    if folder is None or folder.method != METHOD or not (folder.root / WEIGHTS).is_file():
        raise TaskError(f"{path} is no compressed folder: make one by factorpack compress FOLDER --out {path}")
    return folder


def from_pretrained(path: str | Path, mode: str = "dense") -> nn.Module:
    """The network of a compressed folder of Hugging Face, in eval mode, of the class that its config names.

    `mode` as for `load`. transformers' own `from_pretrained` loads the same tensors once factorpack is imported, into a
    class of your choice. Raises TaskError for what is no such folder, FormatError for a damaged one, MismatchError
    where the file lacks tensors of the network, UnsupportedError where transformers is missing.

    Examples:
        >>> encoder = factorpack.from_pretrained("small-encoder")
        >>> encoder(input_ids=torch.tensor([[2, 5, 3]])).last_hidden_state.shape
        torch.Size([1, 3, 384])
    """
    if mode not in MODES:
        raise UnsupportedError(f"{mode!r} is no mode: choose {' or '.join(MODES)}")
    require_transformers()
    folder = _compressed(path)
    model = load_network(folder)
    return model if mode == "dense" else load(folder.root / WEIGHTS, model, mode)


def sentence_transformer(path: str | Path) -> Any:
    """A compressed sentence encoder as a `sentence_transformers.SentenceTransformer`.

    Raises TaskError for what is no compressed folder, UnsupportedError where sentence-transformers is missing.

    Examples:
        >>> encoder = factorpack.sentence_transformer("small-encoder")
        >>> encoder.encode(["a cat", "a dog"]).shape
        (2, 384)
    """
    require_transformers()
    if find_spec("sentence_transformers") is None:
        raise UnsupportedError("sentence_transformer() needs that package: pip install sentence-transformers")
    folder = _compressed(path)
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder.path))
