"""Builds the decoder as machine code where there is a C compiler; without one the package is Python alone."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("src/factorpack/coding/rans.c")
FLAGS = ("-std=c99", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")


class DecoderHook(BuildHookInterface):
    """Puts the shared library beside its source, and in the wheel, which is then one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        library = (Path(self.root) / SOURCE).with_name("_rans" + (".dll" if sys.platform == "win32" else ".so"))
        known = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
        compiler = shlex.split(os.environ.get("CC", "")) or known[:1]
        if not compiler:
            library.unlink(missing_ok=True)
            self.app.display_warning("no C compiler was found: files will be decoded in Python, several times slower")
            return
        made = library.with_suffix(".new")
        try:
            command = [*compiler, *FLAGS, "-o", str(made), str(Path(self.root) / SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            # Renamed, since the one that is there may be in use.
            made.replace(library)
        except (OSError, subprocess.CalledProcessError) as error:
            made.unlink(missing_ok=True)
            told = getattr(error, "stderr", None) or error
            self.app.display_warning(f"the decoder was not compiled ({told}): files will be decoded in Python")
            return
        build_data["artifacts"].append(library.relative_to(self.root).as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{self._platform()}"

    @staticmethod
    def _platform() -> str:
        """Of the library, which on macOS is for one architecture even where Python is for two."""
        if sys.platform == "darwin":
            version = ".".join(platform.mac_ver()[0].split(".")[:1])
            return f"macosx_{version}_0_{platform.machine()}"
        return sysconfig.get_platform().replace("-", "_").replace(".", "_")
