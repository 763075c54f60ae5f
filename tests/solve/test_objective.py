import pytest
import torch

from factorpack.errors import MismatchError
from factorpack.solve.objective import Metric, distortion, gradient

OUTPUTS, INPUTS = 6, 5


def make_metric(groups: int, weighted: bool, seed: int = 0) -> Metric:
    generator = torch.Generator().manual_seed(seed)
    moments, rows = None, None
    if groups:
        samples = torch.randn(groups, 9, INPUTS, generator=generator, dtype=torch.float64)
        moments = samples.mT @ samples
    if weighted:
        rows = torch.rand(OUTPUTS, generator=generator, dtype=torch.float64)
    return Metric(moments, rows)


def weights(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    return pair[0], pair[1]


METRICS = [(0, False), (0, True), (1, False), (1, True), (3, False), (3, True)]


@pytest.mark.parametrize(("groups", "weighted"), METRICS)
def test_distortion_is_the_sum_written_out(groups: int, weighted: bool) -> None:
    metric, (weight, approximation) = make_metric(groups, weighted), weights()
    total = 0.0
    for output in range(OUTPUTS):
        count = 1.0 if metric.row_weights is None else float(metric.row_weights[output])
        for i in range(INPUTS):
            for j in range(INPUTS):
                if metric.moments is None:
                    moment = float(i == j)
                else:
                    moment = float(metric.moments[output // (OUTPUTS // groups), i, j])
                first, second = (float((weight - approximation)[output, index]) for index in (i, j))
                total += count * first * moment * second
    assert float(distortion(weight, approximation, metric)) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("groups", "weighted"), METRICS)
def test_gradient_is_autograds(groups: int, weighted: bool) -> None:
    metric, (weight, approximation) = make_metric(groups, weighted), weights()
    approximation.requires_grad_()
    (expected,) = torch.autograd.grad(distortion(weight, approximation, metric), approximation)
    torch.testing.assert_close(gradient(weight, approximation.detach(), metric), expected)


def test_moments_of_inputs_measure_the_error_of_the_outputs() -> None:
    weight, approximation = weights()
    inputs = torch.randn(20, INPUTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lost = inputs @ weight.T - inputs @ approximation.T
    metric = Metric((inputs.T @ inputs)[None])
    assert float(distortion(weight, approximation, metric)) == pytest.approx(float(lost.square().sum()))


def test_a_metric_changes_its_floating_type_whole() -> None:
    metric = make_metric(2, weighted=True).to(torch.float32)
    assert metric.moments is not None
    assert metric.row_weights is not None
    assert metric.moments.dtype == metric.row_weights.dtype == torch.float32
    assert Metric().to(torch.float32).moments is None


@pytest.mark.parametrize(
    "metric",
    [
        Metric(torch.zeros(1, INPUTS + 1, INPUTS + 1)),
        Metric(torch.zeros(4, INPUTS, INPUTS)),
        Metric(None, torch.ones(OUTPUTS + 1)),
    ],
)
def test_a_metric_for_another_matrix_is_refused(metric: Metric) -> None:
    with pytest.raises(MismatchError, match="not for a matrix"):
        metric.apply(torch.zeros(OUTPUTS, INPUTS))


@pytest.mark.parametrize(
    ("moments", "rows"),
    [(torch.zeros(5, 5), None), (torch.zeros(1, 5, 4), None), (None, torch.ones(2, 3)), (torch.zeros(4, 5, 5), 6)],
)
def test_shapes_that_make_no_metric_are_refused(moments: torch.Tensor | None, rows: torch.Tensor | int | None) -> None:
    # Where annotations are checked they refuse first, with a TypeError.
    with pytest.raises((MismatchError, TypeError)):
        Metric(moments, torch.ones(rows) if isinstance(rows, int) else rows)
