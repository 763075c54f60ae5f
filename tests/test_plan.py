"""A plan comes back from its JSON, and one that was edited wrongly is refused with what is wrong."""

import json

import pytest

from factorpack.coding import records
from factorpack.errors import MismatchError
from factorpack.plan import FORMS, LayerPlan, ModelPlan


def plan():
    layers = {
        "conv.weight": LayerPlan("direct", 0.1, 16, 0, 1.5e-7, 1234, 1 / 3),
        'odd "name"\n': LayerPlan("vq", 2.0**-30, 256, 4, 0.0, 1, 0.0),
        "ünïcode": LayerPlan("svd", 1e300, 1, 0, 5e-324, 10**12, 2.0),
    }
    return ModelPlan(layers, 1e-9, 7, 5_500_000, True, "vbmf")


def test_a_plan_comes_back_in_its_order():
    text = plan().to_json()
    found = ModelPlan.from_json(text)
    assert found == plan()
    assert list(found.layers) == list(plan().layers)
    assert found.to_json() == text
    assert len(text.splitlines()) == len(plan().layers) + 2


def test_a_plan_without_weights_comes_back():
    empty = ModelPlan({}, 0.0, 0, 0, False)
    assert ModelPlan.from_json(empty.to_json()) == empty


def test_whole_numbers_will_do_where_fractions_are_meant():
    data = json.loads(plan().to_json())
    data["rate"] = 2
    data["layers"]["conv.weight"]["step"] = 1
    found = ModelPlan.from_json(json.dumps(data))
    assert (found.rate, found.layers["conv.weight"].step) == (2, 1)


@pytest.mark.parametrize("key", ["rate", "seed", "size_bytes", "behind_prefix", "rank_by", "layers"])
def test_a_missing_key_is_refused(key):
    data = json.loads(plan().to_json())
    del data[key]
    with pytest.raises(MismatchError, match="the plan must have just the keys"):
        ModelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("key", ["form", "step", "rank", "depth", "rate", "size_bytes", "loss"])
def test_a_key_missing_or_unknown_in_a_layer_is_refused_by_its_name(key):
    data = json.loads(plan().to_json())
    layer = data["layers"]["conv.weight"]
    layer[f"{key}_"] = layer[key]
    with pytest.raises(MismatchError, match="conv.weight must have just the keys"):
        ModelPlan.from_json(json.dumps(data))
    del layer[f"{key}_"], layer[key]
    with pytest.raises(MismatchError, match="conv.weight must have just the keys"):
        ModelPlan.from_json(json.dumps(data))


def test_an_unknown_key_is_refused():
    data = json.loads(plan().to_json()) | {"comment": "mine"}
    with pytest.raises(MismatchError, match="just the keys behind_prefix, layers, rank_by, rate, seed, size_bytes"):
        ModelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("form", 3),
        ("form", None),
        ("form", "jpeg"),
        ("step", "0.1"),
        ("step", True),
        ("step", None),
        ("rank", 1.0),
        ("rank", True),
        ("depth", "4"),
        ("rate", [1]),
        ("size_bytes", 12.5),
        ("loss", {}),
    ],
)
def test_a_layer_with_a_value_of_the_wrong_type_is_refused(key, value):
    data = json.loads(plan().to_json())
    data["layers"]["conv.weight"][key] = value
    with pytest.raises(MismatchError):
        ModelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rate", "1"),
        ("seed", 1.5),
        ("seed", False),
        ("size_bytes", None),
        ("behind_prefix", 1),
        ("rank_by", 3),
        ("rank_by", "full"),
    ],
)
def test_a_plan_with_a_value_of_the_wrong_type_is_refused(key, value):
    data = json.loads(plan().to_json()) | {key: value}
    with pytest.raises(MismatchError, match=f"the plan: {key} is"):
        ModelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("layers", [[], None, "conv.weight", {"conv.weight": None}, {"conv.weight": []}])
def test_layers_of_another_kind_are_refused(layers):
    data = json.loads(plan().to_json()) | {"layers": layers}
    with pytest.raises(MismatchError):
        ModelPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", plan().to_json()[:-3], plan().to_json() + "{}"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(MismatchError):
        ModelPlan.from_json(text)


def test_plans_and_files_know_the_same_forms():
    assert FORMS == records.FORMS
