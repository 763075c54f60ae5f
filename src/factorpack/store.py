"""Folders of files that vouch for themselves: what was computed once is read again, what is damaged is told from it.

Each JSON file holds the key of the question, a checksum of its content and one of the file beside it.
"""

import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from factorpack.container import write

Note = Callable[[str], None]
"""Told in a sentence of what was found wrong and mended."""


def unheard(_text: str) -> None:
    """A note that nobody reads."""


def _checksum(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """A subfolder `folder` of JSON files, each with at most one file of bytes beside it, all of one `key`."""

    folder: Path
    key: str
    note: Note

    @classmethod
    def temporary(cls) -> "Store":
        """A store in a folder that is there no longer than itself."""
        folder = Path(mkdtemp())
        made = cls(folder, "", unheard)
        weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
        return made

    def path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}{suffix}"

    def load(self, name: str) -> Any:
        """The content of `name`; None where it is not there or, with a note, not as it was written."""
        path = self.path(name, ".json")
        if not path.exists():
            return None
        try:
            held = json.loads(path.read_bytes())
            good = held["key"] == self.key and held["checksum"] == _checksum(held["content"])
            for suffix, checksum in held["beside"].items():
                good &= sha256(self.path(name, suffix).read_bytes()).hexdigest() == checksum
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        if good:
            return held["content"]
        self.note(f"{path} is damaged or of another model: it is made again")
        return None

    def save(self, name: str, content: object, beside: Mapping[str, bytes] | None = None) -> None:
        """Writes the JSON file last, so that what it vouches for is there."""
        beside = beside or {}
        for suffix, data in beside.items():
            write(self.path(name, suffix), data)
        sums = {suffix: sha256(data).hexdigest() for suffix, data in beside.items()}
        held = {"key": self.key, "checksum": _checksum(content), "beside": sums, "content": content}
        write(self.path(name, ".json"), json.dumps(held).encode())
