"""The command line: arguments and printing, nothing else."""

import os
import sys

from factorpack.cli import making, reading
from factorpack.cli.shared import app

__all__ = ["app", "main", "making", "reading"]


def main() -> None:
    """The entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(app())
