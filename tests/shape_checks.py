"""Holds every call of the package to its annotations, shapes included, while the tests run."""

import os

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# A whole number will do where a float is asked for, as it does for mypy.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """To be called before anything imports the package; FACTORPACK_NO_SHAPE_CHECKS in the environment stops it."""
    if "FACTORPACK_NO_SHAPE_CHECKS" not in os.environ:
        install_import_hook("factorpack", "shape_checks.checked")
