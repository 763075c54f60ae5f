"""Shape annotations of NumPy arrays and torch tensors.

jaxtyping checks them in the tests; where it is not installed they stand for any value, so that it is
no dependency of the package.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Float64, Int32, Int64, Integer
else:
    try:
        from jaxtyping import Float, Float32, Float64, Int32, Int64, Integer
    except ImportError:

        class _Anything:
            def __class_getitem__(cls, _: object) -> object:
                return Any

        Float = Float32 = Float64 = Int32 = Int64 = Integer = _Anything

__all__ = ["Float", "Float32", "Float64", "Int32", "Int64", "Integer"]
