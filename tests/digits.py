"""A task on scikit-learn's digits, small enough to be trained in the tests: 8 x 8 images of ten classes.

Its own folder holds `digits.safetensors`, what `train` gave; `digits_task` in conftest.py makes such a folder.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

output = "logits"
TRAINED = 1300
"""So many of the 1,797 images are for training and calibration, the others for the score."""


class Network(nn.Module):
    """Three convolutions with batch norm and a linear layer, 15 thousand parameters."""

    def __init__(self):
        super().__init__()
        widths = (1, 16, 32, 32)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for place, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            if place < 2:
                x = F.max_pool2d(x, 2)
        return self.head(x.flatten(1))


def data() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) in 0..1 and their classes (N,), in an order of their own."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order].astype(np.float32) / 16)[:, None]
    return images, torch.from_numpy(digits.target[order].astype(np.int64))


def train() -> Network:
    torch.manual_seed(0)
    network = Network()
    images, classes = (part[:TRAINED] for part in data())
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(12):
        for chosen in torch.randperm(TRAINED).split(100):
            optimiser.zero_grad()
            F.cross_entropy(network(images[chosen]), classes[chosen]).backward()
            optimiser.step()
    return network.eval()


def model() -> nn.Module:
    network = Network()
    network.load_state_dict(load_file(Path(__file__).with_name("digits.safetensors")))
    return network.eval()


def calibration():
    return data()[0][:TRAINED].split(100)[:6]


def training(epoch: int):
    """All images for training, in an order of the epoch's own; targets None: distil."""
    images = data()[0][:TRAINED]
    order = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(epoch))
    return ((images[chosen], None) for chosen in order.split(50))


@torch.inference_mode()
def evaluate(network: nn.Module) -> dict[str, float]:
    """Accuracy in % on the held-out digits, and minus the loss in nats."""
    images, classes = (part[TRAINED:] for part in data())
    logits = network(images)
    return {
        "accuracy": 100 * float((logits.argmax(1) == classes).float().mean()),
        "minus_nats": -float(F.cross_entropy(logits, classes)),
    }
