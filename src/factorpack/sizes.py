"""Sizes as people write and read them, kB = 1,000 bytes."""

import re

from factorpack.errors import UnsupportedError

UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}


def parse_size(text: str) -> int:
    """Bytes of "60KB", "5.5 MB", "1MiB" or "60_000": kB = 1,000 bytes; UnsupportedError where it is no size."""
    # A comma is no decimal point here: it stands between thousands or is refused.
    found = re.fullmatch(r"\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|[\d_]*\.?\d+)\s*([a-zA-Z]*)\s*", text)
    try:
        assert found is not None
        size = int(float(found[1].replace("_", "").replace(",", "")) * UNITS[found[2].upper()])
    except (AssertionError, KeyError, ValueError, OverflowError):
        raise UnsupportedError(f"{text!r} is no size: write 60KB, 5.5MB or a number of bytes") from None
    if size < 1:
        raise UnsupportedError(f"a file of {text!r} is no file: write 60KB, 5.5MB or a number of bytes")
    return size


def human(size: int) -> str:
    """Bytes for people, kB = 1,000."""
    for unit, scale in (("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size} B"
