"""Small tensors: one grid each, uniform or logarithmic, as fine as their effect on the network asks for.

Letters: s entries, F their curvature (the loss of a change δ is ½ Σ F δ²).
"""

import math

import numpy as np

from factorpack._shapes import Float32, Float64
from factorpack.factors import STEPS_PER_OCTAVE, FactoredVector, exponents_of, steps_of

FINEST_BITS = 16
"""No grid is finer than that: the values' range in 2^16 steps, where their effect is unknown too."""
COARSEST_BITS = 3
COARSEST_RATIO = 16
"""No logarithmic step is wider than 2^(16/64): beyond, a change is no longer a small one."""


def _uniform(values: Float64[np.ndarray, " s"], step: float, shape: tuple[int, ...]) -> FactoredVector:
    largest = float(np.abs(values).max(initial=0))
    if largest == 0:
        return FactoredVector(shape, np.zeros(values.size, np.int32), 0, 0, logarithmic=False)
    finest, coarsest = (largest / 2 ** (bits - 1) for bits in (FINEST_BITS, COARSEST_BITS))
    exponent = int(exponents_of(np.array([min(max(step, finest), coarsest)]))[0])
    integers = np.rint(values / steps_of(np.array(exponent, np.int32))).astype(np.int32)
    offset = int(np.median(integers))
    return FactoredVector(shape, integers - np.int32(offset), exponent, offset, logarithmic=False)


def _logarithmic(values: Float64[np.ndarray, " s"], ratio: int, shape: tuple[int, ...]) -> FactoredVector:
    integers = np.rint(np.log2(values) * (STEPS_PER_OCTAVE / ratio)).astype(np.int32)
    offset = int(np.median(integers))
    return FactoredVector(shape, integers - np.int32(offset), ratio, offset, logarithmic=True)


def loss(vector: FactoredVector, values: Float32[np.ndarray, "..."], curvature: Float32[np.ndarray, "..."]) -> float:
    """½ Σ F (v − v̂)²."""
    error = values.astype(np.float64) - vector.tensor()
    return 0.5 * float((curvature * error * error).sum())


def _bits(vector: FactoredVector) -> float:
    """About what the integers cost: the entropy of a Gaussian of their spread; to choose a grid by, not a bill."""
    spread = float(np.std(vector.integers))
    return vector.integers.size * math.log2(1 + spread * math.sqrt(2 * math.pi * math.e))


def quantise(
    values: Float32[np.ndarray, "..."], curvature: Float32[np.ndarray, "..."] | None, rate: float
) -> FactoredVector:
    """`values` on the grid with the least loss + rate·bits; on the finest where the curvature is unknown.

    `rate` is λ, loss a bit. At high rate a step Δ loses F Δ²/24 an entry and one bit more a quarter of it, so
    λ asks for Δ² = 12 λ / (ln 2 · mean F); on the logarithmic scale with F·v² in place of F. A curvature that is
    zero in all the data says nothing: it counts as unknown.
    """
    shape = values.shape
    flat = values.astype(np.float64).reshape(-1)
    if curvature is None or not curvature.any():
        return _uniform(flat, 0.0, shape)
    curves = curvature.astype(np.float64).reshape(-1)
    scale = 12 * rate / math.log(2)
    found = [_uniform(flat, math.sqrt(scale / curves.mean()), shape)]
    if flat.size and flat.min() > 0:
        octaves = math.sqrt(scale / (curves * flat * flat).mean()) / math.log(2)
        ratio = min(max(1, int(octaves * STEPS_PER_OCTAVE)), COARSEST_RATIO)
        found.append(_logarithmic(flat, ratio, shape))
    return min(found, key=lambda vector: loss(vector, values, curvature) + rate * _bits(vector))
