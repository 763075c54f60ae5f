"""Pictures and pages of results."""

import json
import re

import pytest

from factorpack.bench.looks import LOOKS, curves, floor
from factorpack.bench.page import page
from factorpack.bench.registry import PEERS
from factorpack.bench.results import Original, Point, Results


def point(peer, setting, size, score, **more):
    return Point(peer, setting, "key", {"torch": "2"}, f"factorpack bench task.py --peers {peer}:{setting}", "c", "m",
                 bytes=size, wrapped_bytes=size + 9, scores={"top1": 50.0, "agreement": score}, **more)  # fmt: skip


@pytest.fixture
def results():
    points = (
        point("factorpack", "5", 3000, 99.0), point("factorpack", "10", 1500, 95.0),
        point("nncodec", "-20", 2000, 90.0),
        point("palette", "2", 900, 10.0), point("palette", "4", 2500, float("nan")),
        Point("hqq", "4x64", "key", {}, "command", "c", "m", error="no <such> layer</script>"),
    )  # fmt: skip
    return Results("a_$_task", Original("key", 12_000, {"top1": 60.0, "agreement": 100.0}), points)


def test_peers_differ_without_colours():
    assert LOOKS.keys() == PEERS.keys()
    assert len({(look.mark, look.dashes) for look in LOOKS.values()}) == len(PEERS)
    assert len({look.mark for look in LOOKS.values()}) == len(PEERS)


def test_curves_are_sorted_and_hold_what_can_be_drawn(results):
    found = curves(results)
    assert {name: [p.setting for p in points] for name, points in found.items()} == {
        "factorpack": ["10", "5"], "nncodec": ["-20"], "palette": ["2"],
    }  # fmt: skip
    assert results.original.score == "agreement"
    assert floor(results) == 55.0


def test_a_picture_is_drawn_of_few_points_and_of_none(results):
    pytest.importorskip("matplotlib")
    from factorpack.bench.plots import plot, plot_all

    assert plot(results).startswith(b"\x89PNG")
    assert plot(Results("none", results.original)).startswith(b"\x89PNG")
    assert plot(results) == plot(results)
    assert plot_all([results] * 3).startswith(b"\x89PNG")


def test_a_page_holds_every_point_and_needs_nothing_else(results):
    text = page(results)
    data = json.loads(re.search(r"const data = (.*);\n", text)[1])
    assert [peer["title"] for peer in data["peers"]] == [
        PEERS[name].title for name in ("factorpack", "nncodec", "palette")
    ]
    for peer in data["peers"]:
        for held in peer["points"]:
            assert held["command"].startswith("factorpack bench task.py --peers ")
    assert data["failed"] == [{"peer": PEERS["hqq"].title, "setting": "4x64", "error": "no <such> layer</script>"}]
    assert text.count("</script>") == 1
    # SVG's namespace is a name, not an address that is asked.
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert len(text) < 40_000
