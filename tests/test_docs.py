"""What the pages show is run: their code, their command lines, and what both print, numbers aside.

Sybil finds the blocks and keeps the names of a page's Python from one block to the next. Pages of docs/how-to begin in
the folder that the tutorial leaves.
"""

import ast
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from torch import nn
from typer.testing import CliRunner

import factorpack
from factorpack.cli import app

ROOT = Path(__file__).resolve().parents[1]
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
BLOCKS = RawFencedCodeBlockLexer(re.compile(r'(?P<language>\w+)(?: title="(?P<title>[^"]+)")?$\n', re.MULTILINE))
PRINTED = "printed by the last block"
NUMBER = re.compile(r"[-−]?\d[\d,.]*(e-?\d+)?")
ELIDED = "…"


def pattern(shown: str) -> str:
    """A pattern of what is shown: any number for a number, any lines for a line of `ELIDED`, any width of a table."""
    lines = [r"(?:.*\n)*?" if line == ELIDED else re.escape(line) + r"\n" for line in plain(shown).splitlines()]
    return "".join(lines)


def plain(text: str) -> str:
    lines = (re.sub(r"[ ─━]+", " ", NUMBER.sub("#", line)).strip() for line in text.strip().splitlines())
    return "\n".join(lines) + "\n"


def check(shown: str, found: str) -> None:
    assert re.fullmatch(pattern(shown), plain(found)), f"the page shows\n{shown}\nand what is printed is\n{found}"


def write(example: Example) -> None:
    Path(example.region.lexemes["title"]).write_text(example.parsed, encoding="utf-8")


def run_python(example: Example) -> None:
    with redirect_stdout(io.StringIO()) as out:
        PythonEvaluator()(example)
    example.namespace[PRINTED] = out.getvalue()


def compare(example: Example) -> None:
    check(example.parsed, example.namespace[PRINTED])


def run_commands(example: Example) -> None:
    """Each line after "$" is a command, the lines up to the next what it prints."""
    for part in re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        program, *arguments = shlex.split(line)
        if program == "factorpack":
            found = CliRunner().invoke(app, arguments)
            code, output = found.exit_code, found.output
        else:
            done = subprocess.run(
                [shutil.which(program) or program, *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
            code, output = done.returncode, done.stdout
        assert code == (1 if shown.startswith("error: ") else 0), output
        check(shown, output)


RUNNERS = {"python": run_python, "text": compare, "console": run_commands}


def blocks(document: Document) -> Iterable[Region]:
    """Blocks with a title are files; `RUNNERS` has the languages of the others that are run."""
    for region in BLOCKS(document):
        runner = write if region.lexemes["title"] else RUNNERS.get(region.lexemes["language"])
        if runner:
            region.parsed, region.evaluator = region.lexemes["source"], runner
            yield region


def run_page(path: Path, **names: object) -> None:
    document = Sybil([SkipParser(), blocks]).parse(path)
    document.namespace.update(names)
    for example in document.examples():
        example.evaluate()


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Path:
    """The folder that the tutorial leaves."""
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        run_page(ROOT / "docs" / "tutorial.md")
    return folder


def test_the_tutorial_runs(tutorial):
    made = {path.name for path in tutorial.iterdir()}
    assert made >= {"network.py", "network.pt", "task.py", "model.fpk", "trained.fpk"}


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_a_how_to_runs(page, tutorial, tmp_path, monkeypatch, short_analysis):
    if "$ cc " in page.read_text(encoding="utf-8") and not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    folder = tmp_path / "work"
    shutil.copytree(tutorial, folder)
    for name in ("factorpack.c", "factorpack.h"):
        shutil.copy(ROOT / "c" / name, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    run_page(page)


class Layers(nn.Module):
    """A network for the README, which names one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer2(self.layer1(x).relu())


def test_the_readme_runs(tmp_path, monkeypatch):
    """With a network of its own, for some steps in place of half an hour."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(40, 16, generator=generator) for _ in range(6)]
    classes = torch.randint(10, (40,), generator=generator)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "TrainingOptions(minutes=30)" in text
    page = tmp_path / "README.md"
    page.write_text(text.replace("TrainingOptions(minutes=30)", "TrainingOptions(steps=5)"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run_page(
        page, model=Layers().eval(), batches=batches, build_model=Layers, torch=torch, rate=1e-6,
        training=lambda epoch: ((batch, None) for batch in batches), data=[(batch, classes) for batch in batches],
        your_loss=nn.functional.cross_entropy,
    )  # fmt: skip
    factorpack.load("trained.fpk", Layers())


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: factorpack\.(\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(factorpack.__all__)


# --- messages -------------------------------------------------------------------------------------------------------

WRAPPED = ("solve/", "coding/", "evaluate/", "factors.py", "tiling.py", "runtime/reference.py")
"""What these raise is for whoever calls parts of the package, or comes out with the name of a tensor before it."""

WORD = re.compile(r"[a-z]{3}")


def template(node: ast.expr) -> str:
    """What a string says, `ELIDED` for what is put into it; "" of anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else ELIDED for part in node.values)
    return ""


def strings_and_raised() -> tuple[set[str], set[str]]:
    """All strings of the source, and those of errors that a user meets as they are."""
    strings, raised = set(), set()
    source = Path(factorpack.__file__).parent
    for path in source.rglob("*.py"):
        met = not str(path.relative_to(source)).startswith(WRAPPED)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.expr):
                strings.add(template(node))
            if met and isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                error = getattr(factorpack.errors, getattr(node.exc.func, "id", ""), None)
                raised |= {template(argument) for argument in node.exc.args if error}
    return strings, raised - {""}


def quoted_messages() -> list[str]:
    """What stands in the first column of the tables on messages."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \| [^|]*\|$", page, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def says(message: str, found: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, message.split(ELIDED))), found, re.DOTALL) is not None


def test_messages_that_are_explained_are_in_the_source():
    strings, _ = strings_and_raised()
    messages = quoted_messages()
    assert len(messages) > 50
    assert [message for message in messages if not any(says(message, found) for found in strings)] == []


def test_every_message_that_a_user_meets_is_explained():
    """What has no word of its own, in the page or in the source, fits anything and explains nothing."""
    _, raised = strings_and_raised()
    messages = [message for message in quoted_messages() if WORD.search(message)]
    met = [found for found in sorted(raised) if WORD.search(found)]
    assert [found for found in met if not any(says(message, found) for message in messages)] == []
