"""A small reader of Factorpack files, version 0.1, written from format.md alone ("section" points into that page).
usage: python minireader.py FILE.fpk OUT.npz    (writes all tensors by name; e.g. minireader.py model.fpk model.npz)
"""

import json
import math
import sys
import zipfile
import zlib
from functools import reduce
from itertools import accumulate

import numpy as np

# Section 3, in the order of the ids. NumPy has no bfloat16 (id 2), so float32 holds its values.
DTYPES = ["<f4", "<f2", "<f4", "<f8", "<i8", "<i4", "<i2", "i1", "u1", "?", "<c8", "<c16", "<u2", "<u4", "<u8"]
WEIGHT, VECTOR, EXACT, ALIAS = range(4)
DIRECT, SPARSE_PCA, SVD, VQ, SEPARABLE = range(5)  # section 7, "Forms"
ANY, ESCAPE = range(-(2**24), 2**24 + 1), 2**31 - 1  # all integers of a stream; what stands for one that is escaped
# Sections 4 and 6: the integers near 2^30 · 2^(i/64), i = 0..64.
root = [*accumulate(range(6), lambda before, _: math.isqrt(before * 2**120), initial=2 * 2**120)]
octave = [2**120] * 64
for bit in range(6):
    octave = [value * root[6 - bit] >> 120 if i >> bit & 1 else value for i, value in enumerate(octave)]
OCTAVE = np.array([value >> 90 for value in octave] + [2**31])


def need(holds: object, what: str) -> None:
    """Refuses the file where a rule does not hold."""
    if not holds:
        raise ValueError(what)


def inflate(data: bytes, size: int) -> bytes:
    """One raw deflate stream of exactly `size` bytes; no more than one byte beyond is ever inflated."""
    out = (stream := zlib.decompressobj(-15)).decompress(data, size + 1)
    need(len(out) == size and stream.eof and not stream.unused_data, f"not one deflate stream of {size} bytes")
    return out


def step(e: np.ndarray) -> np.ndarray:
    """Section 4: 2^(e/64) as it is defined there, exactly in float64."""
    return np.ldexp(OCTAVE[e % 64].astype(np.float64), (e // 64 - 30).astype(np.int32))


class Part:
    """A part of the file. Each method reads what its section tells, from where the one before it stopped."""

    def __init__(self, data: bytes, most_bytes: int) -> None:
        self.data, self.most_bytes, self.at = data, most_bytes, 0

    def take(self, size: int) -> bytes:
        """The next bytes, never beyond the end."""
        need(size <= len(self.data) - self.at, f"{size} bytes are needed, {len(self.data) - self.at} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def varint(self) -> int:
        """Section 1."""
        data = self.take(1)
        while data[-1] > 127 and len(data) < 6:
            data += self.take(1)
        value = sum((byte & 127) << 7 * i for i, byte in enumerate(data))
        need(len(data) <= 5 and value < 2**32 and (data[-1] or len(data) == 1), "a varint too long or beyond 32 bits")
        return value

    def zigzag(self, most: int) -> int:
        """Section 1; `most` is the magnitude that its place allows."""
        u = self.varint()
        need((u + 1) >> 1 <= most, f"an integer beyond {most} in magnitude")
        return -(u >> 1) - 1 if u & 1 else u >> 1

    def model(self) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Section 6: for each slot the symbol's integer (or ESCAPE), f and c (section 5); and low, high and order."""
        head = self.varint()
        explicit, escaped, size = head & 1, head >> 1 & 1, head >> 2
        low = self.zigzag(2**25) if explicit else -size
        high = low + size if explicit else size
        need(size <= (4094 if explicit else 2047) and high <= 2**25, "an alphabet too large or out of bounds")
        stored = self.take((size + 1 if size or escaped else 0) if explicit else min(size, 3))  # a lone symbol has none
        e, order = self.take(2) if escaped else (1, 0)
        if explicit:
            n = np.array([65536 + 1024 * b if b else -1 for b in (*(stored or b"\1"), *[e] * escaped)])
        else:
            z, t, u = stored + bytes((128, 0, 0))[size:]
            j = np.arange(1, size + 1)
            side = np.maximum(0, 327680 - (j - 1) * 4 * t**2 - (j - 1) * (j - 2) // 2 * u**2)
            n = np.array([*side[::-1], 2048 * (z - 128) + 327680, *side, *[2048 * (e - 128) + 327680] * escaped])
        i, o, r = (n >> 8) % 64, (n >> 8) // 64, n % 256
        weights = ((OCTAVE[i] * (256 - r) + OCTAVE[i + 1] * r) >> (38 - o)) * (n >= 0)  # P(n), and 0 where b is
        need(weights.any() and order <= 24 and (e or not explicit), "no weight above zero, or an escape out of bounds")
        f = np.where(weights == 0, 0, np.maximum(1, weights * 2**14 // weights.sum()))
        f[f.argmax()] += 2**14 - f.sum()  # argmax is the first of the largest; from here on they sum to 2^14
        need((f >= (weights > 0)).all(), "a largest frequency that falls below 1")
        values = [*range(low, high + 1), *[ESCAPE] * escaped]
        return np.repeat([values, f, np.cumsum(f) - f], f, axis=1), (low, high, order)

    def classes(self, count: int, contexts: int) -> np.ndarray:
        """Section 5, "Classes"."""
        width = self.take(1)[0]
        need(width <= 4, "classes of more than 4 bits")
        if width == 0:
            return self.stream(1, np.array([count]), range(contexts), bits=64).astype(np.uint8)
        digits = np.unpackbits(np.frombuffer(self.take((count * width + 7) // 8), np.uint8))
        classes = np.packbits(digits[: count * width].reshape(count, width), axis=1)[:, 0] >> (8 - width)
        need((classes < contexts).all() and not digits[count * width :].any(), "classes too large, or no zeros behind")
        return classes

    def stream(self, rows: int, columns: int | np.ndarray, span: range = ANY, bits: int = 127) -> np.ndarray:
        """Section 5: flat integers, all in `span`; runs if `columns` are lengths. The head may have `bits`."""
        runs = isinstance(columns, np.ndarray)
        count = int(columns.sum()) if runs else rows * columns
        # A few bytes can stand for 2^32 integers, and the factors may have far more of them than their tensor.
        need(4 * count <= self.most_bytes, f"{count} integers would take more than {self.most_bytes} bytes")
        head = self.take(1)[0]
        need(not head & ~(bits & ~32 if runs else bits), "a stream's head with bits that do not fit")
        contexts = (head & 15) + 1
        centre = self.zigzag(2**24) if head & 64 else 0
        row = self.classes(rows, contexts) if head & 16 else np.zeros(rows, np.uint8)
        column = self.classes(columns, contexts) if head & 32 else np.zeros(1, np.uint8)
        context = np.repeat(row, columns) if runs else (row[:, None] + np.broadcast_to(column, columns)).reshape(-1)
        models, alphabets = zip(*(self.model() for _ in range(contexts)), strict=True)
        # The tables have an entry for each context and slot, at context·2^14 + slot; `places` becomes that of each
        # integer. Without a coded part slot 0 will do, as all slots of a context stand for its only symbol.
        integer, f, c = np.concatenate(models, axis=1)
        places = np.minimum(context, contexts - 1).astype(np.int32) << 14
        if count and (f < 2**14).any():
            self.rans(places, f, c)
        values = integer.astype(np.int32)[places]
        if ESCAPE in integer:
            values[values == ESCAPE] = self.escapes(places[values == ESCAPE] >> 14, alphabets)
        values += np.int32(centre)
        need(((values >= span.start) & (values < span.stop)).all(), f"an integer outside {span}")
        return values

    def rans(self, places: np.ndarray, f: np.ndarray, c: np.ndarray) -> None:
        """Section 5, "rANS": adds the slot that is decoded to each of `places`, which is context·2^14 before."""
        head = self.varint()
        lanes = self.varint() if head & 1 else 1
        states = np.frombuffer(self.take(4 * lanes), "<u4").astype(np.int64)
        words = np.frombuffer(self.take(2 * (head >> 1)), "<u2").astype(np.int64)
        need(1 + head % 2 <= lanes <= len(places) and (states >= 2**16).all(), "too few or many lanes, or low states")
        for start in range(0, len(places), lanes):  # all lanes decode a symbol; fewer in the last step
            place = places[start : start + lanes]
            x = states[: len(place)]  # a view, as `place` is
            place += x & 16383
            x[:] = f[place] * (x >> 14) + (x & 16383) - c[place]
            low = np.flatnonzero(x < 2**16)
            if len(low):
                need(len(low) <= len(words), "rANS words that run out")
                x[low] = x[low] << 16 | words[: len(low)]
                words = words[len(low) :]
        need(not len(words) and (states == 2**16).all(), "rANS words left over, or a last state other than 2^16")

    def escapes(self, contexts: np.ndarray, alphabets: tuple[tuple[int, int, int], ...]) -> list[int]:
        """Section 5, "Escapes": one integer for each of `contexts`; `alphabets` are low, high and order of all."""
        bits = "".join(f"{byte:08b}" for byte in self.take(self.varint()))
        *prefixes, bits = bits.split("1", len(contexts))
        digits = [alphabets[i][2] + len(zeros) for i, zeros in zip(contexts, prefixes, strict=False)]  # g + q
        need(len(digits) == len(contexts) and max(digits, default=0) <= 26, "too few prefixes, or more than 27 digits")
        at, end, integers = 0, sum(digits) + len(digits), []
        need(0 <= len(bits) - end < 8 and "1" not in bits[end:], "escapes of another size, or no zeros behind them")
        for i, more in zip(contexts, digits, strict=True):
            low, high, order = alphabets[i]
            d = int("1" + bits[at + 1 : at + 1 + more], 2) - 2**order
            integers.append(low - 1 - d if bits[at] == "1" else high + 1 + d)
            at += 1 + more
        return integers

    def grid(self, lines: int) -> tuple[int, np.ndarray]:
        """Section 7, "Grids": half the range, 2^(b−1), and the exponents: one of each line, or one."""
        head = self.take(1)[0]
        need(1 <= head & ~64 <= 25, "a grid of 0 or more than 25 bits")
        each = self.stream(1, lines, range(-7680, 7681)) if head & 64 else np.array([self.zigzag(7680)])
        return 2 ** ((head & 63) - 1), each

    def weight(self, shape: tuple[int, ...]) -> np.ndarray:
        """Section 7: the values of a weight, in float32 and flat."""
        form, flags = self.take(2)
        need(form < 5 and flags < 8 and len(shape) > 1 and all(shape), "an unknown form or flag, or not a matrix")
        groups, depth = self.varint() if flags & 2 else 1, self.varint() if flags & 4 else 0
        entries, inner = math.prod(shape), math.prod(shape[1:])
        need(groups > (flags >> 1 & 1) and depth >= (flags >> 2 & 1), "groups of one, or a depth of none")
        need(shape[0] % groups == 0, "groups that do not divide the first axis")
        m, n = (groups * inner, shape[0] // groups) if flags & 1 else (shape[0], inner)
        d, tiles = (depth, -(-entries // depth)) if depth else (m, n)
        need(depth <= entries and d * tiles <= 2**32, "a depth beyond the tensor's entries, or tiles beyond 2^32")
        k, basis = d, None
        if form == SEPARABLE:
            sides = [side for side in shape[2:] if side > 1]
            need(sides and not flags & 1 and depth == math.prod(sides), "no kernel, flag 1, or a depth not its own")
            need(d * d <= min(2**32, self.most_bytes // 8), "a separable basis that is too large")
            row_exponents = np.array([self.zigzag(7680)])
            factors = [np.array([self.zigzag(2**31) for _ in range(s * s)]).reshape(s, s) for s in sides]
            need(math.prod(int(abs(f).max()) for f in factors) <= 2**24, "factors that multiply to more than 2^24")
            basis = reduce(np.kron, factors).astype(np.float64)
            half = next((2**b for b in range(25) if -(2**b) <= basis.min() and basis.max() < 2**b), 0)
            need(half, "a basis' grid of more than 25 bits")
        else:
            half, row_exponents = self.grid(d)
        if form in (SPARSE_PCA, SVD, VQ):
            k = self.varint()
            need(1 <= k <= max(d, tiles) and k * (d if form == VQ else max(d, tiles)) <= 2**32, "a k of 0 or too large")
            basis = self.stream(d, k, range(-half, half)).reshape(d, k).astype(np.float64)
        codes_half, column_exponents = (0, np.array([0])) if form == VQ else self.grid(tiles)
        need(form == DIRECT or half * codes_half * k < 2**53, "a product that may reach 2^53")
        size = (1, tiles) if form == VQ else (shape[0], shape[1] * d) if form == SEPARABLE else (k, tiles)
        codes = self.stream(*size, range(k) if form == VQ else range(-codes_half, codes_half))
        codes = codes.reshape(tiles, d).T if form == SEPARABLE else codes.reshape(-1, tiles)
        # "Values". Steps become float32 before they are multiplied; slabs of columns keep what is float64 small.
        rows, columns = (step(e).astype(np.float32).astype(np.float64) for e in (row_exponents, column_exponents))
        out, width = np.empty((d, tiles), np.float32), max(1, 2**20 // max(d, k))
        for slab in (slice(start, start + width) for start in range(0, tiles, width)):
            z = codes[:, slab]
            product = z if basis is None else basis[:, z[0]] if form == VQ else basis @ z.astype(np.float64)
            out[:, slab] = product * (rows[:, None] * np.broadcast_to(columns, tiles)[slab])
        flat = (out.T if depth else out).reshape(-1)[:entries]  # "Tilings": a tile is a piece of the matrix, row by row
        return flat.reshape(groups, inner, -1).swapaxes(1, 2).reshape(-1) if flags & 1 else flat

    def vectors(self, sizes: list[int]) -> np.ndarray:
        """Section 8: the values of the small tensors, one after another, in float32."""
        need(sum(sizes) <= 2**32, "more than 2^32 entries of small tensors")
        scales, exponents, offsets = (self.stream(1, len(sizes), s).astype(np.int64) for s in (range(2), ANY, ANY))
        integers = self.stream(len(sizes), np.array(sizes)) + np.repeat(offsets, sizes)
        logarithmic, r = np.repeat(scales == 1, sizes), np.repeat(exponents, sizes)
        e = np.where(logarithmic, integers * r, r)
        need((abs(exponents[scales == 0]) <= 7680).all() and (abs(e) <= 64000).all(), "an exponent out of bounds")
        values, largest = step(e) * np.where(logarithmic, 1, integers), np.finfo(np.float32).max
        return np.clip(values, -largest, largest).astype(np.float32)


@np.errstate(over="ignore")  # what is beyond float32 or float16 becomes infinite
def read(data: bytes, *, most_bytes: int = 2**32) -> dict[str, np.ndarray]:
    """All tensors by name. ValueError if the file is damaged, or if tensors or a stream take more than `most_bytes`."""
    where = "shell"
    try:
        part = Part(data, most_bytes)  # section 2
        header = json.loads(part.take(int.from_bytes(part.take(8), "little")).decode())
        need(data[8:9] == b"{", "no safetensors header")
        blob, metadata = Part(data[part.at :], most_bytes), header.get("__metadata__")
        need(isinstance(metadata, dict) and metadata.get("factorpack") == "0.1", "not version 0.1 of Factorpack")
        tensor = {"dtype": "U8", "shape": [len(blob.data)], "data_offsets": [0, len(blob.data)]}
        texts = {key: str(text) for key, text in metadata.items()}  # safetensors allows nothing but text
        need(header == {"__metadata__": texts, "factorpack": tensor}, "not one tensor of U8, one axis, all the data")
        where = "index"
        stored, size, checksum = np.frombuffer(blob.take(12), "<u4").tolist()
        packed = blob.take(stored)
        need(zlib.crc32(packed) == checksum and size <= 2**28, "a wrong checksum, or more than 2^28 bytes")
        part = Part(inflate(packed, size), most_bytes)
        count, ties = part.varint(), part.varint()  # section 3, column after column
        kinds, dtypes = part.take(count + ties), part.take(count)
        need(max(kinds[:count], default=0) < ALIAS and {*kinds[count:]} <= {ALIAS}, "kinds unknown or out of place")
        need(all(i < (15 if k == EXACT else 4) for k, i in zip(kinds, dtypes, strict=False)), "a dtype out of place")
        shapes = [tuple(part.varint() for _ in range(axes)) for axes in [part.varint() for _ in range(count)]]
        tied = [part.varint() for _ in range(ties)]
        need(all(len(s) <= 16 for s in shapes) and max(tied, default=-1) < count, "more than 16 axes, or a wrong tie")
        need(all(math.prod(s or 1 for s in shape) <= 2**32 for shape in shapes), "a tensor beyond 2^32 entries")
        groups = [[i] for i in range(count) if kinds[i] == WEIGHT]  # the tensors of each record
        groups += filter(None, ([i for i in range(count) if kinds[i] == kind] for kind in (VECTOR, EXACT)))
        sizes = [part.varint() for _ in groups]
        names = part.data[part.at :].decode().split("\n") if kinds or part.at < size else []
        need(len(names) == len(set(names)) == count + ties, "names too few, too many or not all different")
        lengths = [math.prod(s) * np.dtype(DTYPES[i]).itemsize for s, i in zip(shapes, dtypes, strict=True)]
        need(sum(lengths) <= most_bytes, f"tensors of {sum(lengths)} bytes, which is more than {most_bytes}")
        tensors = [np.empty(0)] * count
        for group, size in zip(groups, sizes, strict=True):
            kind, where = kinds[group[0]], f"record with {names[group[0]]!r}"
            part = Part(blob.take(size), most_bytes)
            need(zlib.crc32(part.data) == int.from_bytes(blob.take(4), "little"), "a wrong checksum")
            own = [lengths[i] if kind == EXACT else math.prod(shapes[i]) for i in group]
            if kind == EXACT:  # section 9
                flat = np.frombuffer(inflate(part.take(size), sum(own)), np.uint8)
            else:
                flat = part.weight(shapes[group[0]]) if kind == WEIGHT else part.vectors(own)
            need(part.at == size, "bytes behind the end")
            for i, piece in zip(group, np.split(flat, np.cumsum(own)[:-1]), strict=True):
                need(DTYPES[dtypes[i]] != "?" or piece.max(initial=0) <= 1, "a bool other than 0 and 1")
                value = piece.copy().view(DTYPES[dtypes[i]]) if kind == EXACT else piece.astype(DTYPES[dtypes[i]])
                if dtypes[i] == 2:  # bfloat16: to nearest, ties to even
                    bits = value.view(np.uint32)
                    value = ((bits + (0x7FFF + (bits >> 16 & 1))) & 0xFFFF0000).view(np.float32)
                    need(kind != EXACT or not (bits & 0xFFFF).any(), "a bfloat16 of more than 16 bits")
                tensors[i] = value.reshape(shapes[i])
        need(blob.at == len(blob.data), "bytes behind the last checksum")
        return dict(zip(names, tensors + [tensors[i] for i in tied], strict=True))
    except (ValueError, zlib.error, RecursionError, MemoryError) as error:
        raise ValueError(f"{where}: {str(error) or type(error).__name__}") from None


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        result = read(np.fromfile(sys.argv[1], np.uint8).tobytes())
        with zipfile.ZipFile(sys.argv[2], "w") as npz:  # an npz by hand, as numpy.savez does not take every name
            for name, array in result.items():
                with npz.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, array)
    except (OSError, ValueError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
