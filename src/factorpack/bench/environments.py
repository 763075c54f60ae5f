"""A virtual environment for each peer: its own pinned packages first, those of this interpreter behind them."""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from threading import Lock

import factorpack
from factorpack.errors import UnsupportedError

LINES_OF_AN_ERROR = 3
_MAKING = Lock()


def versions(requirements: Sequence[str]) -> dict[str, str]:
    """What a measurement depends on: a peer's pins, and this interpreter's Python and torch."""
    pins = dict(requirement.split("==") for requirement in requirements)
    python = ".".join(map(str, sys.version_info[:3]))
    return pins | {"python": python, "torch": importlib.metadata.version("torch")}


def python_of(folder: Path, name: str, requirements: Sequence[str]) -> Path:
    """The interpreter of a peer's environment in `folder`, which is made where it is not there.

    Without requirements it is this interpreter. Packages are installed without what they depend on, so that nothing
    but the pins is: the rest, torch above all, is shared. Raises UnsupportedError, with pip's words, where that fails.
    """
    if not requirements:
        return Path(sys.executable)
    digest = sha256(repr((sorted(requirements), sys.version, sys.prefix)).encode()).hexdigest()
    place = folder / f"{name}-{digest[:8]}"
    with _MAKING:
        if not (place / "ready").is_file():
            _make(place, name, requirements)
        _share(place)
    return place / "bin" / "python"


def _make(place: Path, name: str, requirements: Sequence[str]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, symlinks=True)
    _share(place)
    # Of `python -m venv`'s two parts only this one is slow, and pip need not be in there to install there.
    run = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), "install", "--quiet", "--no-deps",
         "--disable-pip-version-check", *requirements],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        raise UnsupportedError(f"{name} cannot be installed: {' / '.join(lines[-LINES_OF_AN_ERROR:])}")
    (place / "ready").write_text("\n".join(requirements) + "\n")


def _share(place: Path) -> None:
    """Paths in a .pth file come behind the environment's own packages, those of PYTHONPATH would come before."""
    own = next(place.glob("lib/python*/site-packages"))
    source = Path(factorpack.__file__).parents[1]
    (own / "shared.pth").write_text(f"{source}\n{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
