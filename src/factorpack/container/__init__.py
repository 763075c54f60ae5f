"""The file."""

from factorpack.container.layout import Bill, Contents, TensorBill
from factorpack.container.reader import read
from factorpack.container.writer import to_bytes, write

__all__ = ["Bill", "Contents", "TensorBill", "read", "to_bytes", "write"]
