"""The smallest network in training: one linear layer."""

from functools import partial

import numpy as np
from torch import nn

from factorpack.coding.records import price_codes
from factorpack.factors import IDENTITY_GRID, Basis, Codes, FactoredVector, FactoredWeight, Grid
from factorpack.nn.loading import Stored
from factorpack.nn.trainable import TrainableModel
from factorpack.tiling import Tiling


def linear(integers: np.ndarray) -> TrainableModel:
    """Of form `direct` with these codes and a bias of zeros."""
    rows, columns = integers.shape
    codes = Codes(integers, Grid(-4, 4, np.array([-256], np.int32)))
    weight = FactoredWeight("direct", Tiling((rows, columns)), Basis(None, IDENTITY_GRID), codes)
    bias = FactoredVector((rows,), np.zeros(rows, np.int32), -384, 0, False)
    tensors: dict[str, Stored] = {"weight": weight, "bias": bias}
    pricer = partial(price_codes, radius=8)
    return TrainableModel(nn.Linear(columns, rows), tensors, dict.fromkeys(tensors, "float32"), {}, pricer)
