"""Batch norms as the two numbers a channel that they are in eval mode.

With y = w·(x − μ)/√(σ² + ε) + b, the pair w' = w·√(1+ε)/√(σ² + ε), b' = b − w·μ/√(σ² + ε) with μ' = 0, σ²' = 1 gives
the same y: the running statistics become constants, which cost nothing.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from factorpack.nn.loading import identity

FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def _tensors(module: nn.Module) -> list[Tensor]:
    held = (*module._parameters.values(), *module._buffers.values())
    return [t for t in held if t is not None and not nn.parameter.is_lazy(t) and t.layout is torch.strided]


def fold_batch_norms(model: nn.Module, spared: Callable[[str], bool]) -> tuple[str, ...]:
    """Folds the batch norms of `model` in place; returns the names of those modules.

    Left alone are those without affine parameters or running statistics, of a class with a forward of its own, with
    tensors that other modules share, or of which `spared` says that a tensor is to stay as it is.
    """
    owners = Counter(identity(t) for module in model.modules() for t in _tensors(module))
    folded = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or type(module).forward not in FORWARDS:
            continue
        # Not by attribute: a parametrised weight is computed anew each time, and what is written there is lost.
        weight, bias = (module._parameters.get(part) for part in ("weight", "bias"))
        mean, variance = (module._buffers.get(part) for part in ("running_mean", "running_var"))
        tensors = (weight, bias, mean, variance)
        if any(t is None or nn.parameter.is_lazy(t) or t.is_meta or not bool(t.isfinite().all()) for t in tensors):
            continue
        parts = ("weight", "bias", "running_mean", "running_var")
        shared = any(owners[identity(t)] > 1 for t in tensors if t is not None)
        if shared or any(spared(f"{name}.{part}" if name else part) for part in parts):
            continue
        assert weight is not None
        assert bias is not None
        assert mean is not None
        assert variance is not None
        with torch.no_grad():
            slope = weight.double() / (variance.double() + module.eps).sqrt()
            bias.copy_(bias.double() - slope * mean.double())
            weight.copy_(slope * (1 + module.eps) ** 0.5)
            mean.zero_()
            variance.fill_(1)
        folded.append(name)
    return tuple(folded)
