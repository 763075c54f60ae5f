"""The decoder in C, built with the compiler's checks of memory and of undefined behaviour."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "c"
CHECKED = [
    "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-O1", "-g",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip


def compiler() -> str:
    """Of C; skips where there is none."""
    found = shutil.which("cc")
    if found is None:
        pytest.skip("there is no C compiler (cc)")
    return found


def built(main: Path, folder: Path) -> Path:
    """The program of a source with `main`; skips where there is no C compiler."""
    program = folder / main.stem
    command = [compiler(), *CHECKED, "-I", SOURCES, SOURCES / "factorpack.c", main, "-o", program]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return program
