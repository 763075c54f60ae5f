"""Builds the decoder as machine code where there is a C compiler; without one the package is Python alone."""

import os
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
        library.unlink(missing_ok=True)
        compiler = (
            shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
        )
        if not compiler:
            self.app.display_warning("no C compiler was found: files will be decoded in Python, several times slower")
            return
        command = [*compiler, *FLAGS, "-o", str(library), str(Path(self.root) / SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", None) or error
            self.app.display_warning(f"the decoder was not compiled ({told}): files will be decoded in Python")
            library.unlink(missing_ok=True)
            return
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
