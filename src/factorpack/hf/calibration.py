"""Calibration of a folder's network: batches of sentences or images, and the output that is looked at.

Letters: N samples, T tokens, D width of the network.
"""

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factorpack.errors import MismatchError, TaskError, UnsupportedError
from factorpack.hf.folder import LARGEST_IN_MEMORY, Folder, load_network, network_on_disk, read_json, weight_bytes
from factorpack.nn.on_disk import NetworkOnDisk
from factorpack.pipeline import Source

MOST_SENTENCES = 512
MOST_TOKENS = 256
"""Of a sentence."""
BATCH_SENTENCES, BATCH_TOKENS, BLOCKWISE_TOKENS = 64, 4096, 512
"""So many sentences and tokens at most in a batch, padding counted; fewer tokens where a network is gone through block
by block: its logits are then the most that is in memory."""
MOST_IMAGES, BATCH_IMAGES = 256, 16
IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda hidden, mask: (hidden * mask).sum(1) / mask.sum(1),
    "mean_sqrt_len_tokens": lambda hidden, mask: (hidden * mask).sum(1) / mask.sum(1).sqrt(),
    "cls": lambda hidden, _: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(mask == 0, -torch.inf).amax(1),
    "lasttoken": lambda hidden, mask: hidden[torch.arange(len(hidden)), mask.sum((1, 2)).long() - 1],
}
"""Of hidden states (N, T, D) and a mask (N, T, 1) of the tokens that are no padding, which come first: (N, D)."""
LEGACY_POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
"""As modules of sentence-transformers before 5.3 are written, behind "pooling_mode_", where names differ."""


@dataclass(frozen=True)
class Head:
    """A forward hook that makes of a network's output what is looked at; padding counts for nothing.

    With `pooling`, the pooled embedding, of unit length where it is `normalised`; else logits or hidden states.
    """

    pooling: str = ""
    normalised: bool = False

    def __call__(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = getattr(output, "last_hidden_state", None)
        found = getattr(output, "logits", hidden)
        if not isinstance(found, Tensor):
            return output
        mask = kwargs.get("attention_mask")
        if self.pooling:
            assert hidden is not None
            real = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden.dtype)
            pooled = POOLINGS[self.pooling](hidden, real[..., None])
            return F.normalize(pooled) if self.normalised else pooled
        if mask is not None and found.shape[:-1] == mask.shape:
            return found * mask[..., None].to(found.dtype)
        return found


def _pooling(folder: Folder) -> Head:
    """The head of a sentence encoder, as its modules say; without a pooling, none."""
    module = folder.module("Pooling")
    if module is None:
        return Head()
    config = read_json(folder.path / str(module["path"]) / "config.json")
    chosen = config.get("pooling_mode") or [
        LEGACY_POOLINGS.get(key.removeprefix("pooling_mode_"), key.removeprefix("pooling_mode_"))
        for key, value in config.items() if key.startswith("pooling_mode_") and value is True
    ]  # fmt: skip
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    if len(names) != 1 or names[0] not in POOLINGS:
        raise TaskError(
            f"{folder.path} pools by {' and '.join(map(str, names)) or 'nothing'}; known are {', '.join(POOLINGS)}: "
            "write a task file (.py) whose network pools by itself"
        )
    return Head(names[0], folder.module("Normalize") is not None)


def _sentences(path: Path, seed: int) -> list[str]:
    """At most `MOST_SENTENCES` of the lines of a file that are not empty, drawn by `seed`."""
    if not path.is_file():
        what = "is a folder, and the network takes text" if path.is_dir() else "does not exist"
        raise TaskError(f"--calibrate {path} {what}: give a text file, one sentence a line")
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"--calibrate {path} cannot be read as text in UTF-8 ({error})") from error
    if not found:
        raise TaskError(f"--calibrate {path} holds no sentence: write a few hundred, one a line")
    return random.Random(seed).sample(found, min(len(found), MOST_SENTENCES))


def _text_batches(folder: Folder, model: Any, path: Path, seed: int, most_tokens: int) -> list[dict[str, Tensor]]:
    from transformers import AutoTokenizer

    sentences = _sentences(path, seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.root)
    except Exception as error:
        raise TaskError(f"{folder.path}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    if tokenizer.pad_token is None:
        # What stands where nothing counts; decoders are trained without padding.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    positions = getattr(model.config, "max_position_embeddings", None) or MOST_TOKENS
    length = min(MOST_TOKENS, tokenizer.model_max_length, positions)
    lengths = [len(ids) for ids in tokenizer(sentences, truncation=True, max_length=length)["input_ids"]]
    # Of like length together: little padding. A tokenizer may make nothing of a sentence.
    order = sorted((place for place, found in enumerate(lengths) if found), key=lambda place: lengths[place])
    batches: list[list[int]] = []
    for place in order:
        last = batches[-1] if batches else []
        if not last or len(last) == BATCH_SENTENCES or (len(last) + 1) * lengths[place] > most_tokens:
            batches.append(last := [])
        last.append(place)
    taken = inspect.signature(model.forward).parameters
    made = []
    for places in batches:
        tokens = tokenizer(
            [sentences[place] for place in places], padding=True, truncation=True, max_length=length,
            return_tensors="pt",
        )  # fmt: skip
        made.append({name: tensor for name, tensor in tokens.items() if name in taken})
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        # Its decoder is to say the sentence again.
        for batch in made:
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["input_ids"])
    return made


def _image_batches(folder: Folder, path: Path, seed: int) -> list[dict[str, Tensor]]:
    if not path.is_dir():
        what = "is a file, and the network takes images" if path.is_file() else "does not exist"
        raise TaskError(f"--calibrate {path} {what}: give a folder of images")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
    if not files:
        raise TaskError(f"--calibrate {path} holds no image ({', '.join(sorted(IMAGES))}): give a few dozen")
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError('images need Pillow: pip install "factorpack[hf]"') from error
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(folder.root)
    except Exception as error:
        raise TaskError(
            f"{folder.path}: its image processor cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    files = random.Random(seed).sample(files, min(len(files), MOST_IMAGES))
    batches = []
    for start in range(0, len(files), BATCH_IMAGES):
        images = []
        for file in files[start : start + BATCH_IMAGES]:
            try:
                images.append(Image.open(file).convert("RGB"))
            except OSError as error:
                raise TaskError(f"{file} is no image that can be read ({error})") from error
        batches.append({"pixel_values": processor(images, return_tensors="pt")["pixel_values"]})
    return batches


def _on_disk(folder: Folder) -> NetworkOnDisk | None:
    """A large network with its weights on disk; None for one that is brought into memory."""
    if weight_bytes(folder) <= LARGEST_IN_MEMORY:
        return None
    try:
        return network_on_disk(folder)
    except MismatchError:
        # transformers renames, splits and joins the weights of some networks when it loads them.
        return None


def calibrated(folder: Folder, data: Path, seed: int) -> Source:
    """The folder's network with calibration batches from a text file, one sentence a line, or a folder of images.

    What is looked at: the pooled embedding of a sentence encoder, else logits, else hidden states. Raises TaskError
    where network or data cannot be read or do not fit, UnsupportedError where transformers or Pillow are missing, or
    accelerate for a large network.
    """
    head = _pooling(folder)
    on_disk = _on_disk(folder)
    model: Any = load_network(folder) if on_disk is None else on_disk.model
    # Parts of a network may have configs of their own.
    for config in {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values():
        if hasattr(config, "use_cache"):
            config.use_cache = False
    takes = getattr(model, "main_input_name", "")
    if takes == "input_ids":
        batches = _text_batches(folder, model, data, seed, BATCH_TOKENS if on_disk is None else BLOCKWISE_TOKENS)
    elif takes == "pixel_values":
        batches = _image_batches(folder, data, seed)
    else:
        raise TaskError(
            f"{folder.path}: its network takes {takes or 'unknown inputs'}, neither text nor images: write a task file"
        )
    with torch.no_grad():
        try:
            output = (on_disk or model)(**{name: tensor[:1] for name, tensor in batches[0].items()})
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise TaskError(f"{folder.path}: the network failed on {data}: {told}; write a task file (.py)") from error
    model.register_forward_hook(head, with_kwargs=True)
    return Source(on_disk or model, batches, "logits" if getattr(output, "logits", None) is not None else "embedding")
