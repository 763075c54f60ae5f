"""Curves, files that keep a score, files of plans: composition over one analysis."""

import json
import struct
import sys
from dataclasses import replace

import pytest

from factorpack import BudgetError, MismatchError, Options, TaskError, UnsupportedError
from factorpack import cache as cache_module
from factorpack import curve as curve_module
from factorpack.cache import analyse
from factorpack.curve import Curve, Goal, Point, Workshop, draw_curve, keep_score, plot, sizes_between
from factorpack.pipeline import Source, load
from factorpack.plan import ModelPlan
from factorpack.task import load_task

RATES = cache_module.rates_of


def silent(_stage: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch):
    """Drawing takes longer than all else here."""
    monkeypatch.setattr(curve_module, "DOTS_PER_INCH", 20)


@pytest.fixture(scope="module")
def task(digits_task):
    return load_task(str(digits_task.path))


@pytest.fixture(scope="module")
def source(task):
    return Source(task.model(), task.calibration(), task.output)


@pytest.fixture(scope="module")
def analysis(source, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "rates_of", lambda state: RATES(state)[::6])
        return analyse(source, Options(), tmp_path_factory.mktemp("cache"), silent, [].append)


def scoring(task, function):
    """The task with another evaluate()."""
    return replace(task, functions=dict(task.functions) | {"evaluate": function})


def test_a_curve_is_files_scores_and_a_picture(task, analysis, tmp_path):
    curve = draw_curve(task, analysis, tmp_path, [3000, 5000], lambda size: f"make {size}", silent)
    held = json.loads((tmp_path / "curve.json").read_text())
    assert held["task"] == "digits_task.py"
    assert held["original"] == task.evaluate(task.model())
    assert [point["command"] for point in held["points"]] == ["make 3000", "make 5000"]
    for point, size in zip(held["points"], (3000, 5000), strict=True):
        path = tmp_path / f"{size}.fpk"
        assert point["size_bytes"] == path.stat().st_size <= size
        assert point["scores"] == task.evaluate(load(path, task.model()))
        assert point["seconds"] > 0
    assert held["points"][0]["predicted_loss"] > held["points"][1]["predicted_loss"] > 0
    assert tuple(held["points"][0]) == tuple(Point.__dataclass_fields__)
    picture = (tmp_path / "curve.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (140, 90)
    assert len(curve.points) == 2


def test_finished_points_are_not_made_again(task, analysis, tmp_path, monkeypatch):
    first = draw_curve(task, analysis, tmp_path, [3100, 5100], str, silent)
    data = (tmp_path / "3100.fpk").read_bytes()
    made = []
    pack = type(analysis).pack
    monkeypatch.setattr(type(analysis), "pack", lambda *given: made.append(given[1]) or pack(*given))
    evaluated = []
    counting = scoring(task, lambda model: evaluated.append(1) or task.evaluate(model))
    again = draw_curve(counting, analysis, tmp_path, [3100, 5100], str, silent)
    assert again == first
    assert made == []
    assert len(evaluated) == 1, "the original alone"
    (tmp_path / "3100.fpk").write_bytes(data[:-5])
    draw_curve(task, analysis, tmp_path, [3100], str, silent)
    assert (tmp_path / "3100.fpk").read_bytes() == data
    assert made == [3100]


def test_another_evaluation_scores_finished_files_again(task, analysis, tmp_path):
    draw_curve(task, analysis, tmp_path, [3200], str, silent)
    other = scoring(task, lambda model: {"half": task.evaluate(model)["accuracy"] / 2})
    found = draw_curve(other, analysis, tmp_path, [3200], str, silent)
    assert list(found.points[0].scores) == ["half"]


def test_sizes_are_spaced_in_their_log():
    sizes = sizes_between((1234, 98_765), 8)
    assert len(sizes) == 8
    ratios = [after / before for before, after in zip(sizes, sizes[1:], strict=False)]
    assert ratios == pytest.approx([(98_765 / 1234) ** (1 / 7)] * 7, rel=0.01)
    assert sizes_between((1231, 1232), 3) == [1230]


@pytest.mark.parametrize("sizes", [[900], [60_000, 61_000], [1_000_000, 90_000_000]])
def test_a_picture_is_drawn_for_any_sizes_and_names(sizes):
    points = tuple(Point(f"{size}.fpk", size, size, {"a $core": 1.0}, 0.1, 1.0, "") for size in sizes)
    assert plot(Curve("$ta_sk$.py", {"a $core": 2.0}, points)).startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(task, analysis, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install factorpack\[curve\]"):
        draw_curve(task, analysis, tmp_path, [3000], str, silent)
    assert not list(tmp_path.iterdir())


def test_the_smallest_file_that_keeps_a_score_keeps_it(task, analysis, tmp_path, monkeypatch):
    monkeypatch.setattr(curve_module, "EVALUATIONS", 4)
    seen = []
    counting = scoring(task, lambda model: seen.append(task.evaluate(model)) or seen[-1])
    steps = []
    kept = keep_score(counting, analysis, 3.0, lambda *told: steps.append(told))
    original, files = seen[0]["accuracy"], seen[1:]
    assert kept.evaluations == len(files) - 2 <= 4
    assert kept.drop == original - kept.scores["accuracy"] <= 3.0
    assert ("evaluations", 1, 4) in steps
    near = [kept.scores, *files[-2:]]
    mean = sum(scores["accuracy"] for scores in near) / 3
    expected = (sum((scores["accuracy"] - mean) ** 2 for scores in near) / 2) ** 0.5
    assert kept.score_spread == pytest.approx(expected)
    path = tmp_path / "a.fpk"
    path.write_bytes(kept.packed.data)
    assert task.evaluate(load(path, task.model())) == kept.scores


def test_bisection_ends_at_the_smallest_size_that_will_do(task, analysis, monkeypatch):
    """A score that falls with the size alone: 4,000 bytes are the least."""
    sizes = []

    pack = type(analysis).pack
    monkeypatch.setattr(type(analysis), "pack", lambda *given: sizes.append(given[1]) or pack(*given))
    found = scoring(task, lambda _: {"fits": float(not sizes or sizes[-1] >= 4000)})
    kept = keep_score(found, analysis, 0.0, silent)
    assert 0.995 * 4000 <= len(kept.packed.data) <= 1.03 * 4000
    assert kept.evaluations <= 8
    assert len(sizes) == kept.evaluations + 2
    assert [size / len(kept.packed.data) for size in sizes[-2:]] == pytest.approx([0.993, 0.986], abs=1e-3)


def test_a_score_that_no_file_keeps_is_told_with_how_near_it_came(task, analysis):
    calls = []
    worse = scoring(task, lambda _: calls.append(1) or {"accuracy": 90.0 - 5 * len(calls)})
    with pytest.raises(BudgetError, match=r"has accuracy 80, which is 5 below the original's 85 \(--max-drop 1\)"):
        keep_score(worse, analysis, 1.0, silent)
    assert len(calls) == 2


@pytest.mark.parametrize("drop", [-1.0, float("nan"), float("inf")])
def test_what_is_no_drop_is_refused(task, analysis, drop):
    with pytest.raises(UnsupportedError, match="zero or more"):
        keep_score(task, analysis, drop, silent)


def test_a_task_without_scores_keeps_none(task, analysis, tmp_path):
    mute = replace(task, functions={"model": task.model})
    with pytest.raises(TaskError, match=r"no function evaluate\(\), which --max-drop needs"):
        keep_score(mute, analysis, 1.0, silent)
    with pytest.raises(TaskError, match=r"no function evaluate\(\), which a curve needs"):
        draw_curve(mute, analysis, tmp_path, [3000], str, silent)


@pytest.fixture(scope="module")
def planned(source):
    packed, _, _ = Workshop(source, Options(), None, silent, [].append).made(Goal(5000), None)
    return packed


def followed(source, plan):
    return Workshop(source, Options(), None, silent, [].append).made(Goal(plan=plan), None)[0]


def test_a_plan_that_nobody_edited_gives_the_same_bytes(source, planned):
    plan = ModelPlan.from_json(planned.plan.to_json())
    assert followed(source, plan).data == planned.data


def test_an_edited_plan_is_followed(source, planned):
    name = "convolutions.1.weight"
    layer = planned.plan.layers[name]
    edited = replace(layer, form="direct", rate=layer.rate / 2, step=0.0, rank=0, size_bytes=0, loss=0.0)
    found = followed(source, replace(planned.plan, layers=dict(planned.plan.layers) | {name: edited}))
    assert found.plan.layers[name].form == "direct"
    assert found.plan.layers[name].rate == layer.rate / 2
    assert len(found.data) > len(planned.data)
    same = replace(planned.plan, layers=dict(planned.plan.layers) | {name: replace(edited, rate=layer.rate)})
    ratio = followed(source, same).plan.layers[name].step / found.plan.layers[name].step
    assert ratio == pytest.approx(2**0.5, rel=0.05)


def test_a_plan_of_a_cache_gives_the_bytes_of_the_cache(source, analysis):
    packed = analysis.pack(4500, silent)
    workshop = Workshop(source, Options(), analysis.store.folder.parent, silent, [].append)
    assert workshop.made(Goal(plan=packed.plan), None)[0].data == packed.data


def test_a_plan_of_another_model_is_refused(source, planned):
    layers = dict(planned.plan.layers)
    layers["tail.weight"] = layers.pop("head.weight")
    with pytest.raises(MismatchError, match="the plan is not of this model"):
        followed(source, replace(planned.plan, layers=layers))


@pytest.mark.parametrize(
    ("change", "error", "part"),
    [
        ({"form": "vq"}, UnsupportedError, "the plan wants vq"),
        ({"rate": 0.0}, MismatchError, "λ is positive"),
        ({"rate": -1.0}, MismatchError, "λ is positive"),
        ({"rate": float("nan")}, MismatchError, "λ is positive"),
    ],
)
def test_a_plan_that_no_rate_leads_to_is_refused(source, planned, change, error, part):
    layers = {name: replace(layer, **change) for name, layer in planned.plan.layers.items()}
    with pytest.raises(error, match=part):
        followed(source, replace(planned.plan, layers=layers))


def test_the_ticks_of_an_axis_are_round_sizes():
    assert curve_module._ticks(1000, 12_000) == [1000, 2000, 5000, 10_000]
    assert len(curve_module._ticks(60_000, 61_000)) >= 2
