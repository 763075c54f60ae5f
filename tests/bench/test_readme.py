"""The README's tables are those of the results that are kept."""

import importlib.util
from pathlib import Path

import pytest

from factorpack.bench.registry import PEERS
from factorpack.bench.results import Original, Point, Results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("bench_readme", ROOT / "bench" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def point(peer, setting, size, score, wrapped=10**9):
    return Point(peer, setting, "key", {}, "command", "commit", "machine",
                 bytes=size, wrapped_bytes=wrapped, scores={"score": score})  # fmt: skip


def test_the_readme_is_what_the_results_say(readme):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.written(text, ROOT / "bench" / "results") == text, "make readme"


def test_the_smallest_file_that_is_near_enough_is_shown(readme, tmp_path):
    points = (
        point("factorpack", "5", 300, 79.5), point("factorpack", "10", 200, 77.0), point("factorpack", "20", 50, 60.0),
        point("nncodec", "-28", 190, 76.5, wrapped=180), point("palette", "2", 10, 1.0),
    )  # fmt: skip
    Results("digits", Original("key", 4000, {"score": 80.0}), points).save(tmp_path)
    found = readme.tables(tmp_path)
    one, five, _ = found.split("\n\n")
    assert "| original | 4,000 B: 80 |" in one
    assert "| Factorpack | **300 B: 79.5** |" in one
    assert f"| {PEERS['nncodec'].title} (no data) | none |" in one
    # Where a peer wins, it is the peer that is set in bold.
    assert "| Factorpack | 200 B: 77 |" in five
    assert f"| {PEERS['nncodec'].title} (no data) | **180 B: 76.5** |" in five
    assert PEERS["quanto"].title not in found


def test_losses_count_where_scores_are_below_nought(readme):
    results = Results(
        "t", Original("k", 1, {"score": -2.0}), (point("palette", "4", 9, -2.05), point("palette", "3", 8, -2.2))
    )
    assert readme.smallest(results, "palette", 0.05).setting == "4"
    assert readme.smallest(results, "palette", 0.01) is None


def test_a_changed_readme_is_noticed(readme, tmp_path):
    Results("t", Original("k", 1, {"score": 1.0}), (point("palette", "4", 9, 1.0),)).save(tmp_path)
    text = f"head\n{readme.BEGIN}\n{readme.END}\nfoot\n"
    new = readme.written(text, tmp_path)
    assert new.startswith("head\n")
    assert new.endswith("\nfoot\n")
    assert readme.written(new, tmp_path) == new
    assert readme.written(new.replace("9 B", "8 B"), tmp_path) == new
