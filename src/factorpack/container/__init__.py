"""The file."""

from factorpack.container.layout import Bill, Contents, TensorBill
from factorpack.container.reader import File, read
from factorpack.container.writer import make_folder, to_bytes, write

__all__ = ["Bill", "Contents", "File", "TensorBill", "make_folder", "read", "to_bytes", "write"]
