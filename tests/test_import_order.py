"""Who may import whom: data flows one way, and a file is read without torch."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "factorpack"
FREE = {"errors", "_shapes"}
"""What everything may import."""
ALLOWED = {
    "errors": set(),
    "_shapes": set(),
    "tiling": FREE,
    "factors": FREE | {"tiling"},
    "plan": FREE,
    "allocate": FREE | {"plan"},
    "coding": FREE | {"coding", "factors", "tiling"},
    "threads": set(),
    "container": FREE | {"container", "coding", "factors", "tiling", "threads"},
    "solve": FREE | {"solve", "factors", "tiling"},
    "runtime": FREE | {"runtime", "factors", "tiling"},
    "nn": FREE | {"nn", "runtime", "solve", "factors", "tiling", "threads"},
    "evaluate": FREE | {"evaluate", "sizes", "container", "nn", "solve", "factors", "tiling"},
    "export": FREE | {"export", "container", "nn", "factors", "tiling"},
    "task": FREE,
    "bars": set(),
    "store": FREE | {"container"},
    "sizes": {"errors"},
}
"""By the first name below the package; what is missing here is composition."""
LATER = {"bench", "cli", "curve", "cache", "pipeline", "reporting", "trained", "training", "hf"}
COMPOSITION = {
    "workers": {*LATER, "options", "candidates", "assembly", "pool", "search"},
    "options": {*LATER, "candidates", "assembly", "pool", "search"},
    "candidates": {*LATER, "assembly", "pool", "search"},
    "assembly": {*LATER, "pool", "search"},
    "pool": {*LATER, "search"},
    "search": LATER,
    "pipeline": {"bench", "cli", "curve", "cache", "reporting", "training", "hf"},
    "cache": {"bench", "cli", "curve", "reporting", "training", "hf"},
    "curve": {"bench", "cli", "reporting", "hf"},
    "reporting": {"bench", "cli", "hf"},
    "trained": {"bench", "training", "hf"},
    "training_options": {"bench", "cli", "devices", "training", "hf"},
    "devices": {"bench", "cli", "training", "hf"},
    "training": {"bench", "cli", "hf"},
    "bench": {"cli", "hf"},
    "hf": {"bench", "cli", "curve", "cache", "reporting", "training", "trained"},
    "cli": set(),
    "__init__": {"bench", "cli"},
}
"""Composition, and what of the package even that may not import."""
WITHOUT_TORCH = {"factors", "tiling", "plan", "allocate", "errors", "_shapes", "coding", "container", "threads"}


def unit_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules_of(tree, package):
    """Dotted names that a module imports, anywhere in it; relative ones made whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            # `from factorpack import tiling` names a unit in its list.
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "factorpack" else (base,)


@cache
def imports():
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        package = ["factorpack", *path.relative_to(ROOT).parts[:-1]]
        name, unit = path.relative_to(ROOT).as_posix(), unit_of(path)
        found += [(name, unit, module) for module in modules_of(ast.parse(path.read_text()), package)]
    return found


def test_the_walk_sees_the_imports_there_are():
    seen = {(unit, module) for _, unit, module in imports()}
    assert ("factors", "factorpack.tiling") in seen
    assert ("container", "factorpack.coding.records") in seen
    tree = ast.parse(
        "from factorpack import plan\nfrom . import a\nfrom ..solve.start import b\ndef f():\n import torch"
    )
    found = set(modules_of(tree, ["factorpack", "nn"]))
    assert found == {"factorpack.plan", "factorpack.nn", "factorpack.solve.start", "torch"}


def test_every_module_has_a_place_in_the_order():
    units = {unit_of(path) for path in ROOT.rglob("*.py")}
    assert units <= ALLOWED.keys() | COMPOSITION.keys(), "say in this file what the new module may import"


def test_imports_go_one_way():
    wrong = []
    for path, unit, module in imports():
        if module.split(".")[0] != "factorpack" or module == "factorpack":
            continue
        target = module.split(".")[1]
        if target not in ALLOWED[unit] if unit in ALLOWED else target in COMPOSITION[unit]:
            wrong.append(f"{path} imports {module}")
    assert not wrong


def test_what_reads_files_does_not_import_torch():
    wrong = [
        f"{path} imports {module}"
        for path, unit, module in imports()
        if unit in WITHOUT_TORCH and (module.split(".")[0] == "torch" or module.startswith("safetensors.torch"))
    ]
    assert not wrong


def test_transformers_is_imported_late():
    """It takes seconds: at the head of a module only where transformers itself asks for that."""
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                wrong += [
                    path.name for name in names if name.split(".")[0] in ("transformers", "sentence_transformers")
                ]
    assert set(wrong) == {"quantizer.py"}


@pytest.mark.parametrize(
    "module", ["factorpack", "factorpack.cli", "factorpack.container", "factorpack.coding.records", "factorpack.plan"]
)
def test_a_fresh_interpreter_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr or f"{module} loads torch"
