"""The distortion of a weight and its gradient.

Letters: m outputs, n inputs of one group, g groups.

    D(Ŵ) = Σ_o r_o · (w_o - ŵ_o)ᵀ H_γ(o) (w_o - ŵ_o),    γ(o) = o // (m / g)

w_o is row o of the weight seen as outputs x inputs, H the second moments of the layer's inputs, r what an error
of an output counts. Without H and r this is ‖W - Ŵ‖².
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from factorpack._shapes import Float
from factorpack.errors import MismatchError


@dataclass(frozen=True, eq=False)
class Metric:
    """What an error of a weight costs.

    `moments` (g, n, n), symmetric and positive semidefinite, one matrix a group of rows; None is the identity.
    `row_weights` (m,), none of them negative; None is one each.

    Raises MismatchError where the shapes do not fit one another.
    """

    moments: Float[Tensor, "g n n"] | None = None
    row_weights: Float[Tensor, " m"] | None = None

    def __post_init__(self) -> None:
        moments, rows = self.moments, self.row_weights
        if moments is not None and (moments.ndim != 3 or moments.shape[1] != moments.shape[2]):
            raise MismatchError(f"moments have shape (groups, n, n), not {tuple(moments.shape)}")
        if rows is not None and rows.ndim != 1:
            raise MismatchError(f"row weights have shape (m,), not {tuple(rows.shape)}")
        if moments is not None and rows is not None and rows.numel() % moments.shape[0]:
            raise MismatchError(f"{moments.shape[0]} groups of moments do not divide {rows.numel()} row weights")

    def to(self, dtype: torch.dtype) -> "Metric":
        """The same metric in another floating type."""
        return Metric(
            None if self.moments is None else self.moments.to(dtype),
            None if self.row_weights is None else self.row_weights.to(dtype),
        )

    def apply(self, error: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Row o becomes r_o · H_γ(o) e_o.

        Raises MismatchError where the metric is not for a matrix of this shape.
        """
        outputs, inputs = error.shape
        if self.moments is not None:
            groups = self.moments.shape[0]
            if self.moments.shape[1] != inputs or outputs % groups:
                raise MismatchError(f"moments {tuple(self.moments.shape)} are not for a matrix {(outputs, inputs)}")
            error = torch.bmm(error.reshape(groups, -1, inputs), self.moments).reshape(outputs, inputs)
        if self.row_weights is not None:
            if self.row_weights.numel() != outputs:
                raise MismatchError(f"{self.row_weights.numel()} row weights are not for a matrix {(outputs, inputs)}")
            error = error * self.row_weights[:, None]
        return error


def distortion(weight: Float[Tensor, "m n"], approximation: Float[Tensor, "m n"], metric: Metric) -> Float[Tensor, ""]:
    """D(Ŵ), the sum over all outputs; differentiable."""
    error = weight - approximation
    return (error * metric.apply(error)).sum()


def gradient(weight: Float[Tensor, "m n"], approximation: Float[Tensor, "m n"], metric: Metric) -> Float[Tensor, "m n"]:
    """∂D/∂Ŵ, row o of it -2 r_o · H_γ(o) (w_o - ŵ_o), with one product instead of autograd's three."""
    return -2.0 * metric.apply(weight - approximation)
