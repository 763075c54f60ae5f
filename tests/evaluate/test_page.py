"""The page: every form in it, hostile names harmless in it, and, in a browser, silence and no requests."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from threading import Thread

import numpy as np
import pytest
from laws import vector, weight

from factorpack.coding.records import FORMS
from factorpack.container import Contents, read, to_bytes
from factorpack.evaluate.page import LEAST_SHARE, cells, columns, digits, embedded, render, visible
from factorpack.evaluate.report import (
    WIDEST,
    Comparison,
    Estimate,
    FileReport,
    Histogram,
    Provenance,
    describe,
    with_losses,
)
from factorpack.evaluate.treemap import treemap
from factorpack.factors import OneHotCodes
from factorpack.tiling import Tiling

HOSTILE = (
    "</script><script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>.'`${alert(1)}",
    "</title></style><svg/onload=alert(1)>{{ 7*7 }}{% raw %}",
    "<!--<script>&lt;&#60;\\u003c\u2028\u202etxet\x00\x1b[31m",
    "n" * 5000,
    "",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def contents(names: tuple[str, ...] = ()) -> Contents:
    """A weight of every form, a small and an exact tensor, a tie; `names` in place of their own."""
    rng = np.random.default_rng(0)
    tensors = {form: weight(rng, form, Tiling((10, 4, 3, 3), depth=9), columns="one") for form in FORMS}
    tensors |= {"bias": vector(rng, (5,), False), "steps": np.arange(3)}
    tensors = dict(zip([*names, *list(tensors)[len(names) :]], tensors.values(), strict=True))
    dtypes = {name: "int64" if isinstance(value, np.ndarray) else "float32" for name, value in tensors.items()}
    first = next(iter(tensors))
    return Contents(tensors, dtypes | {"tied": "float32"}, {"tied": first})


def report_of(folder, held: Contents) -> FileReport:
    path = folder / "a.fpk"
    path.write_bytes(to_bytes(held))
    provenance = Provenance("0" * 64, "0.1", {"factorpack": "0"}, {"This page": "factorpack report <a&b>"})
    return describe(path.name, *read(path), provenance)


def full(report: FileReport, name: str = "score") -> FileReport:
    """With all that a task adds."""
    names = [layer.name for layer in report.layers]
    losses = {name: Estimate(0.002 * place, 0.0005) for place, name in enumerate(names)}
    found = with_losses(report, dict.fromkeys(names, 0.02), dict.fromkeys(names, 0.001), losses, (names[0],))
    whole = Estimate(0.01, float("inf"))
    comparison = Comparison(name, "logits", {name: 91.5}, {name: 91.0}, 1, 1, Estimate(0.0, 0.0), whole, unlike=True)
    return replace(found, comparison=comparison)


class Page(HTMLParser):
    """Elements, scripts, texts, headings, labelled and unlabelled pictures of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.ids, self.texts = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.lasttag == "script" and self.scripts and self.rawdata:
            self.scripts[-1] += data

    def all(self, *tags):
        return [attributes for tag, attributes in self.tags if tag in tags]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return report_of(tmp_path_factory.mktemp("plain"), contents())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return full(report_of(tmp_path_factory.mktemp("hostile"), contents(HOSTILE)), HOSTILE[0])


@pytest.mark.parametrize("sizes", [[1], [5, 5], [8, 1, 3, 3, 1, 1], [1e6, 1], list(range(1, 60))])
def test_a_treemap_fills_its_rectangle_without_overlaps(sizes):
    boxes = treemap(sizes, 10, 4)
    areas = [box.width * box.height for box in boxes]
    assert areas == pytest.approx([40 * size / sum(sizes) for size in sizes])
    points = np.random.default_rng(0).random((200, 2)) * (10, 4)
    for x, y in points:
        inside = [b for b in boxes if b.left <= x < b.left + b.width and b.top <= y < b.top + b.height]
        assert len(inside) == 1


def test_the_treemap_holds_every_byte(held):
    found = cells(held)
    assert sum(cell.size_bytes for cell in found) == held.size_bytes
    assert {cell.kind for cell in found} == {*FORMS, "shared"}
    for cell in found:
        assert cell.box.width * cell.box.height / 1e4 == pytest.approx(cell.size_bytes / held.size_bytes)


def test_histograms_count_what_lies_beyond():
    rng = np.random.default_rng(0)
    integers = rng.integers(-50, 20, (30, 40)).astype(np.int32)
    found = Histogram.of(integers)
    assert (found.low, len(found.counts), found.above) == (-WIDEST, WIDEST + 20, 0)
    assert found.below == (integers < -WIDEST).sum() > 0
    for place, count in enumerate(found.counts):
        assert count == (integers == found.low + place).sum()
    assert Histogram.of(np.zeros((0, 3), np.int32)) == Histogram(0, (0,), 0, 0)
    outside = Histogram.of(np.full((2, 2), 90, np.int32))
    assert (sum(outside.counts), outside.above) == (0, 4)
    used = Histogram.of_codewords(OneHotCodes(np.array([3, 3, 1, 3, 1], np.int32), 100))
    assert used.counts[:3] == (3, 2, 0)
    assert (len(used.counts), used.above) == (2 * WIDEST + 1, 0)


def test_heights_go_with_the_logarithm_of_the_share():
    whole, tenth, none = (columns(Histogram(0, counts, 0, 0))[0].height for counts in ((1,), (1, 9), (0, 1)))
    assert (whole, none) == (1, 0)
    assert tenth == pytest.approx(1 - np.log(0.1) / np.log(LEAST_SHARE))
    low, high = columns(Histogram(-2, (1, 5, 1), 3, 4))[::4]
    assert (low.label, high.label) == ("below −2: 3 (21.4 %)", "above 0: 4 (28.6 %)")
    assert low.beyond


def test_numbers_have_three_digits_that_count():
    found = [digits(value) for value in (0, 1.71236, 0.0012345, 12.34, 1234.5, 3e-7, -0.5, float("inf"), None)]
    assert found == ["0", "1.71", "0.00123", "12.3", "1,234", "3.00e-07", "-0.500", "not finite", "–"]


def test_a_page_says_what_the_report_says(held):
    page = Page(render(held))
    text = " ".join(page.texts)
    assert f"{held.size_bytes:,}" in text
    for layer in held.layers:
        assert layer.form in text
        assert f"{layer.size_bytes:,}" in text
    assert json.loads(page.scripts[0]) == json.loads(json.dumps(held.to_dict()))
    assert "the same tensor as direct" in text
    assert "Measured loss" not in text
    whole = " ".join(Page(render(full(held))).texts)
    assert "Measured loss" in whole
    assert "0 ± 0.50" in whole
    assert "Is this the right original?" in whole
    assert "1.00 (guess)" in whole


def test_a_file_without_weights_has_a_page(tmp_path):
    found = report_of(tmp_path, Contents({"steps": np.arange(3)}, {"steps": "int64"}, {}))
    assert found.bits_per_weight is None
    assert "No tensor of this file is factored" in render(found)
    assert "Every tensor" not in render(found)


def test_losses_that_are_not_finite_have_a_page(held):
    names = [layer.name for layer in held.layers]
    broken = dict.fromkeys(names, float("nan"))
    measured = dict.fromkeys(names, Estimate(float("inf"), float("nan")))
    page = Page(render(replace(full(held), layers=with_losses(held, broken, broken, measured, ()).layers)))
    assert "not finite" in " ".join(page.texts)
    assert json.loads(page.scripts[0])["layers"][0]["relative_error"] is None


def test_pages_have_headings_scopes_and_titles(hostile):
    page = Page(render(hostile))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all("scope" in attributes for attributes in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = page.all("svg")
    assert len(pictures) == 5 + len(hostile.layers)
    for picture in pictures:
        assert picture["role"] == "img"
        assert set(picture["aria-labelledby"].split()) <= set(ids)
    assert page.all("html") == [{"lang": "en"}]
    regions = [a for a in page.all("div") if a.get("role") == "region"]
    assert all(region["aria-label"] and region["tabindex"] == "0" for region in regions)


def test_hostile_names_are_text_and_nothing_else(held, hostile):
    plain, page = Page(render(full(held))), Page(render(hostile))
    # The same elements in the same order: no name opened or closed one, nor gave one a handler.
    elements, expected = ([tag for tag, _ in found.tags if tag != "wbr"] for found in (page, plain))
    assert elements == expected
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert len(page.scripts) == 2
    names = [layer["name"] for layer in json.loads(page.scripts[0])["layers"]]
    assert names == list(HOSTILE[: len(names)])
    text = "".join(page.texts)
    assert HOSTILE[0] in text
    assert "{{ 7*7 }}" in text
    assert not {"\u202e", "\x00", "\x1b", "\u2028"} & set(render(hostile))
    assert "n" * 201 not in re.sub("<script.*?</script>", "", render(hostile), flags=re.DOTALL)


def test_names_are_shown_as_they_can_be_read():
    assert visible("a\u202eb\x00") == "a\\u202eb\\x00"
    assert visible("größe.重み") == "größe.重み"
    assert visible("") == "(empty name)"
    assert visible("n" * 300) == "n" * 200 + "…"


def test_embedded_json_ends_no_element():
    text = str(embedded({"</script><!--": ["&amp;", "\u2028", "]]>"]}))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script><!--": ["&amp;", "\u2028", "]]>"]}


def chromium(address: str, folder) -> tuple[str, list[str], set[str]]:
    """The page's elements after its scripts, what it wrote to the console, and the addresses that it asked for."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    log = folder / "net.json"
    run = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         # The browser's own requests go nowhere.
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
         f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", f"--log-net-log={log}",
         "--virtual-time-budget=2000", "--dump-dom", address],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    params = [event.get("params", {}) for event in json.loads(log.read_text(errors="replace"))["events"]]
    # What the browser itself asks for, the page among it, has no origin.
    asked = {p["url"] for p in params if "method" in p and p.get("initiator", "not an origin") != "not an origin"}
    return run.stdout, console, asked


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A folder that is served, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as found:
        thread = Thread(target=found.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_a_browser_finds_no_error_and_asks_for_nothing(hostile, server, tmp_path):
    folder, address = server
    (folder / "page.html").write_text(render(hostile), encoding="utf-8")
    dom, console, asked = chromium(f"{address}/page.html", tmp_path)
    assert console == []
    assert asked == set()
    # The script ran: headings became buttons.
    assert dom.count("<button") == 12 + 1


def test_the_browser_s_log_would_tell_of_errors_and_requests(server, tmp_path):
    folder, address = server
    page = (
        "<link rel=icon href=data:,><img src=http://elsewhere.invalid/picture.png><script>console.error('E')</script>"
    )
    (folder / "page.html").write_text(page)
    _, console, asked = chromium(f"{address}/page.html", tmp_path)
    assert any('"E"' in line for line in console)
    assert asked == {"http://elsewhere.invalid/picture.png"}


def test_the_page_s_policy_runs_no_other_script(held, server, tmp_path):
    folder, address = server
    text = render(held).replace("</main>", "<img src=/p.png><script>document.title = 'taken'</script></main>")
    (folder / "page.html").write_text(text, encoding="utf-8")
    dom, console, asked = chromium(f"{address}/page.html", tmp_path)
    assert "<title>a.fpk: a report</title>" in dom
    assert "Content Security Policy" in " ".join(console)
    assert asked == set()


def test_a_click_on_a_heading_sorts_the_layers(held, server, tmp_path):
    folder, address = server
    clicks = "const button = document.querySelectorAll('.layers thead button')[5]; button.click();"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(held))
    text = text.replace("</body>", f"<script>{clicks}</script></body>")
    (folder / "page.html").write_text(text, encoding="utf-8")
    dom, console, _ = chromium(f"{address}/page.html", tmp_path)
    assert console == []
    rows = dom.split('<table class="layers', 1)[1].split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]
    found = [int(re.findall(r'data-value="([^"]*)"', row)[3]) for row in rows]
    assert found == sorted((layer.size_bytes for layer in held.layers), reverse=True)
    assert 'aria-sort="descending"' in dom
