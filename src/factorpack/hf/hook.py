"""transformers learns of compressed folders once both packages are imported, in either order, and never before.

Importing transformers takes seconds: a watcher among the finders of modules waits for the module that holds its
quantizers, and registers ours as soon as that has run.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

QUANTIZERS = "transformers.quantizers.auto"
METHOD = "factorpack"
"""As config.json of a compressed folder names it."""


def _register(quantizers: ModuleType) -> None:
    # Earlier versions, without a place for quantizers of others, find no weights in a folder and say so.
    if hasattr(quantizers, "register_quantizer"):
        # Not by a name of its own: where that module is what imports transformers, it is not through yet.
        import_module("factorpack.hf.quantizer")


class _Watcher(MetaPathFinder):
    """Finds nothing by itself: it only adds to what running one module does."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == QUANTIZERS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Registers the quantizer where transformers is imported already, or when it will be."""
    if (quantizers := sys.modules.get(QUANTIZERS)) is not None:
        _register(quantizers)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
