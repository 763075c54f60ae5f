"""Integers as bytes: symbol models, interleaved rANS, streams. NumPy only, and integers alone on decoding."""

from factorpack.coding.models import Histogram, SymbolModel, fit
from factorpack.coding.reader import Reader, append_varint, append_zigzag
from factorpack.coding.streams import (
    Bits,
    IntegerPlan,
    Prices,
    decode_integers,
    decode_runs,
    encode_integers,
    encode_runs,
    plan_integers,
    plan_runs,
)

__all__ = [
    "Bits",
    "Histogram",
    "IntegerPlan",
    "Prices",
    "Reader",
    "SymbolModel",
    "append_varint",
    "append_zigzag",
    "decode_integers",
    "decode_runs",
    "encode_integers",
    "encode_runs",
    "fit",
    "plan_integers",
    "plan_runs",
]
