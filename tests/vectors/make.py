"""Makes the golden files anew: `python tests/vectors/make.py`, which is for a new version of the format alone.

Together they hold every form, tiling, kind, dtype and every part that a stream of integers can have. What a reader
must find in them is in digests.json (`digest`).
"""

import json
import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import laws  # noqa: E402

from factorpack.container import Contents, read, to_bytes  # noqa: E402
from factorpack.container.layout import DTYPES, NUMPY_DTYPES  # noqa: E402
from factorpack.factors import Basis, Codes, FactoredVector, FactoredWeight, Grid, OneHotCodes  # noqa: E402
from factorpack.tiling import Tiling  # noqa: E402


def digest(values: np.ndarray) -> str:
    """Of a tensor's shape and its values, little-endian, row by row; bfloat16 as the float32 of equal value."""
    data = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    shape = "x".join(map(str, values.shape))
    return f"{values.dtype.name} {shape} {blake2b(data, digest_size=16).hexdigest()}"


def contents(tensors: dict, dtypes: dict[str, str] | None = None, aliases: dict[str, str] | None = None) -> Contents:
    """Factored tensors are float32 unless said otherwise."""
    named = {n: v.dtype.name if isinstance(v, np.ndarray) else "float32" for n, v in tensors.items()} | (dtypes or {})
    aliases = aliases or {}
    return Contents(tensors, named | {alias: named[target] for alias, target in aliases.items()}, aliases)


def direct(integers: np.ndarray, exponent: int = -300) -> FactoredWeight:
    """A weight whose integers are the codes."""
    top = max(int(integers.max()), -int(integers.min()) - 1, 1)
    half = 1 << top.bit_length()
    codes = Codes(integers.astype(np.int32), Grid(-half, half - 1, np.array([exponent], np.int32)))
    return FactoredWeight("direct", Tiling(integers.shape), Basis(None, Grid(-1, 0, np.zeros(1, np.int32))), codes)


def forms() -> Contents:
    """Every form over every tiling and layout of steps."""
    return contents(dict(laws.weights(1)))


def streams() -> Contents:
    """Rows and columns of different spread, a centre, long tails, few and many symbols, one lane and many."""
    rng = np.random.default_rng(1)
    rows, columns = 2.0 ** rng.integers(0, 6, 96), 2.0 ** rng.integers(0, 6, 200)
    normal = rng.normal(size=(96, 200))
    far = np.zeros((24, 60))
    far.reshape(-1)[::97] = rng.integers(-(2**24), 2**24, 15)
    tails = np.rint(rng.standard_t(1, (40, 80)) * 2).clip(-(2**24), 2**24 - 1)
    return contents(
        {
            "equal": direct(np.full((5, 7), 3)),
            "zeros": direct(np.zeros((3, 4), np.int32)),
            "rows": direct(np.rint(normal * rows[:, None])),
            "long rows": direct(np.rint(normal.T * columns[:, None])),
            "columns": direct(np.rint(normal * columns)),
            "rows and columns": direct(np.rint(normal * rows[:, None] * columns / 8)),
            "sorted rows": direct(np.rint(np.tile(normal, (8, 1)) * np.repeat([0.3, 8.0], 384)[:, None])),
            "centre": direct(np.rint(normal[:20] * 3 + 1000)),
            "tails": direct(tails),
            "far": direct(far),
            "extremes": direct(np.array([[2**24 - 1, -(2**24), 0, 1]])),
            "two values": direct(rng.choice([-7, 900], (30, 30))),
            "uniform": direct(rng.integers(-2000, 2000, (60, 60))),
            "sparse": direct((rng.random((200, 300)) < 0.01) * rng.integers(-1, 2, (200, 300))),
            "many lanes": direct(np.rint(rng.normal(size=(80, 300)) * 4)),
        }
    )


def dtypes() -> Contents:
    """Every dtype: exact, of a weight, of a small tensor; every dtype's extremes; ties."""
    rng = np.random.default_rng(2)
    tensors: dict = {}
    named: dict[str, str] = {}
    for dtype in DTYPES:
        held = np.dtype(NUMPY_DTYPES[dtype])
        if dtype == "bool":
            values = rng.integers(0, 2, (2, 3)).astype(held)
        elif held.kind in "iu":
            limits = np.iinfo(held)
            values = np.array([[limits.min, limits.max, 1], [0, 2, 3]], held)
        elif dtype == "bfloat16":
            values = (rng.normal(size=(2, 3)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        else:
            values = (rng.normal(size=(2, 3)) * (1 + 1j if held.kind == "c" else 1)).astype(held)
            values.reshape(-1)[:3] = [np.inf, -0.0, np.nan]
        tensors[f"exact {dtype}"], named[f"exact {dtype}"] = values, dtype
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        for name, value in (
            ("weight", laws.weight(rng, "svd", Tiling((9, 14)))),
            ("codewords", laws.weight(rng, "vq", Tiling((9, 14), depth=3))),
            ("linear", laws.vector(rng, (7,), False)),
            ("logarithmic", laws.vector(rng, (7,), True)),
            ("huge", FactoredVector((3,), np.array([1, 0, -1], np.int32), 64000, 0, True)),
        ):
            tensors[f"{name} {dtype}"], named[f"{name} {dtype}"] = value, dtype
    for name, shape in (("scalar", ()), ("nothing", (0,)), ("no rows", (0, 5)), ("many axes", (1,) * 16)):
        tensors[name] = np.full(shape, 5, np.int32)
        tensors[f"small, {name}"] = laws.vector(rng, shape, False)
    return contents(tensors, named, {"tied": "weight float16", "Straße/重み": "scalar"})


def one_hot() -> Contents:
    """Many codewords, indices of one kind, and a single codeword."""
    rng = np.random.default_rng(3)
    tiling, grid = Tiling((64, 64), depth=4), laws.grid(rng, 8, 1)
    tensors = {}
    for name, indices, k in (
        ("many", rng.integers(0, 256, 1024), 256),
        ("sorted", np.repeat(np.arange(16), 64), 16),
        ("one", np.zeros(1024), 1),
    ):
        words = Basis(laws.integers(rng, 8, (4, k), 1.0), grid)
        tensors[name] = FactoredWeight("vq", tiling, words, OneHotCodes(indices.astype(np.int32), k))
    return contents(tensors)


FILES = {"forms": forms, "streams": streams, "dtypes": dtypes, "one_hot": one_hot, "empty": lambda: contents({})}


def main() -> None:
    found = {}
    for name, make in FILES.items():
        path = FOLDER / f"{name}.fpk"
        path.write_bytes(to_bytes(make()))
        found[path.name] = digests(path)
        print(f"{path.name}: {path.stat().st_size:,} bytes, {len(found[path.name])} tensors")
    (FOLDER / "digests.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def digests(path: Path) -> dict[str, str]:
    """Of every tensor in a file, ties included, as `factorpack` reads it."""
    import torch

    from factorpack.nn.loading import state_dict

    contents, _ = read(path)
    tensors = state_dict(contents.tensors, contents.dtypes, contents.aliases)
    return {n: digest((t.float() if t.dtype == torch.bfloat16 else t).numpy()) for n, t in sorted(tensors.items())}


if __name__ == "__main__":
    main()
