"""Batch norms as the two numbers a channel that they are in eval mode.

With y = w·(x − μ)/√(σ² + ε) + b, the pair w' = w·√(1+ε)/√(σ² + ε), b' = b − w·μ/√(σ² + ε) with μ' = 0, σ²' = 1 gives
the same y: the running statistics become constants, which cost nothing.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def fold_batch_norms(model: nn.Module, spared: Callable[[str], bool]) -> tuple[str, ...]:
    """Folds the batch norms of `model` in place; returns the names of those modules.

    Left alone are those without affine parameters or running statistics, of a class with a forward of its own, with
    tensors that other modules share, or of which `spared` says that a tensor is to stay as it is.
    """
    owners = Counter(id(t) for module in model.modules() for t in module._parameters.values() if t is not None)
    folded = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or type(module).forward not in FORWARDS:
            continue
        weight, bias, mean, variance = module.weight, module.bias, module.running_mean, module.running_var
        tensors = (weight, bias, mean, variance)
        if any(t is None or nn.parameter.is_lazy(t) or t.is_meta or not bool(t.isfinite().all()) for t in tensors):
            continue
        parts = ("weight", "bias", "running_mean", "running_var")
        shared = max(owners[id(weight)], owners[id(bias)]) > 1
        if shared or any(spared(f"{name}.{part}" if name else part) for part in parts):
            continue
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
