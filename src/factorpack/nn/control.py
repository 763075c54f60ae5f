"""How much a bit is worth in training: λ, steered so that the file keeps its size while bits move between layers."""

import math
from dataclasses import dataclass

SMOOTHING = 0.05
"""Part of the running loss that a new one makes up."""
INTEGRAL, PROPORTIONAL = 10.0, 100.0
"""By how much log λ grows at each look, and stands above that, for a file that is larger by its whole size."""
LEAST_PACE = 0.1
"""Lower ones count as this: a gain of one over their root would grow without bound."""
LARGEST_TURN = 0.3
"""Of log λ, at one look."""
LARGEST_STAND = 3.0
"""Of log λ above what the integral part says."""
RANGE = 300.0
"""λ stays within that factor of what the loss says."""


@dataclass(eq=False)
class RateController:
    """λ in loss a bit, for `count` codes that are to take `goal` bytes.

    At high rate the loss falls by 2 ln 2 times itself a bit a weight, so that λ = 2 ln 2 · loss / count is where
    bits are worth what they cost (Gersho & Gray 1991). A controller with an integral and a proportional part goes on
    from there: each look at the real size moves λ. The slower codes move, the more of it is proportional: what a size
    does then comes late, and an integral that does not wait for it swings to and fro.
    """

    count: int
    goal: float
    loss: float | None = None
    logarithm: float = 0.0
    error: float = 0.0
    pace: float = 1.0

    def heard(self, loss: float) -> None:
        """Takes in the loss of a batch."""
        if self.loss is None:
            self.loss, self.logarithm = loss, math.log(self._expected(loss))
        else:
            self.loss += SMOOTHING * (loss - self.loss)

    def seen(self, size: float, pace: float = 1.0) -> None:
        """Takes in the bytes that the codes take now, and the part of their highest rate that they move at."""
        self.error, self.pace = size / self.goal - 1, max(pace, LEAST_PACE)
        turn = min(max(INTEGRAL * self.pace * self.error, -LARGEST_TURN), LARGEST_TURN)
        middle = math.log(self._expected(self.loss or 0.0))
        self.logarithm = min(max(self.logarithm + turn, middle - math.log(RANGE)), middle + math.log(RANGE))

    def _expected(self, loss: float) -> float:
        return 2 * math.log(2) * max(loss, 1e-12) / max(self.count, 1)

    @property
    def rate(self) -> float:
        """λ; 0 before the first loss."""
        if self.loss is None:
            return 0.0
        stand = PROPORTIONAL / math.sqrt(self.pace) * self.error
        return math.exp(self.logarithm + min(max(stand, -LARGEST_STAND), LARGEST_STAND))
