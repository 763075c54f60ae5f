"""The file holds everything bit for bit, bills every byte, and refuses what is damaged, foreign or too new."""

import json
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib
from itertools import islice
from pathlib import Path

import laws
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

import factorpack
from factorpack.coding import append_varint, encode_integers
from factorpack.coding.records import FORMS, encode_vectors, encode_weight
from factorpack.container import Contents, File, read, to_bytes, write
from factorpack.container.layout import DTYPES, EXACT, KEY, MAX_AXES, NUMPY_DTYPES, PARTS, VECTOR, VERSION, WEIGHT
from factorpack.container.writer import deflate
from factorpack.errors import FactorpackError, FormatError, UnsupportedError
from factorpack.factors import FactoredWeight
from factorpack.tiling import Tiling


def contents_of(tensors, aliases=None, dtypes=None):
    """Contents whose dtypes are those of exact arrays and float32 for all else, unless said otherwise."""
    named = {n: v.dtype.name if isinstance(v, np.ndarray) else "float32" for n, v in tensors.items()} | (dtypes or {})
    aliases = aliases or {}
    return Contents(tensors, named | {alias: named[target] for alias, target in aliases.items()}, aliases)


def random_contents(seed):
    rng = np.random.default_rng(seed)
    every = list(laws.weights(seed))
    picked = rng.choice(len(every), int(rng.integers(0, 5)), replace=False)
    tensors = {every[i][0]: every[i][1] for i in picked}
    for i in range(int(rng.integers(0, 5))):
        tensors[f"small.{i}"] = laws.vector(
            rng, tuple(rng.integers(0, 6, int(rng.integers(0, 4))).tolist()), i % 2 == 0
        )
    for i in range(int(rng.integers(0, 4))):
        tensors[f"exact.{i}"] = rng.integers(-(2**62), 2**62, tuple(rng.integers(0, 4, i).tolist()), endpoint=True)
    names = list(tensors)
    rng.shuffle(names)
    tensors = {name: tensors[name] for name in names}
    return contents_of(tensors, {f"tied.{i}": names[int(rng.integers(len(names)))] for i in range(len(names) // 2)})


def small_contents():
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": laws.weight(rng, "direct", Tiling((4, 5))),
        "a.bias": laws.vector(rng, (4,), False),
        "b.weight": laws.weight(rng, "vq", Tiling((4, 4), depth=2)),
        "steps": np.array(7, np.int64),
    }
    return contents_of(tensors, {"c.weight": "a.weight"})


def saved(tmp_path, data, name="file.fpk"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_every_form_tiling_and_layout_of_steps_comes_back_from_one_file(tmp_path):
    bill = laws.assert_file_law(contents_of(dict(laws.weights(1))), tmp_path)
    assert [w.name for w in bill.weights] == [name for name, _ in laws.weights(1)]


@pytest.mark.parametrize("seed", range(25))
def test_random_contents_come_back_and_every_byte_is_billed(seed, tmp_path):
    laws.assert_file_law(random_contents(seed), tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"": np.zeros(3, np.int8)}, {"ünïcode / name": np.zeros(1, np.uint8)}])
def test_odd_contents_come_back(tensors, tmp_path):
    laws.assert_file_law(contents_of(tensors), tmp_path)


def test_the_file_is_valid_safetensors_with_one_tensor(tmp_path):
    path = saved(tmp_path, to_bytes(small_contents()))
    with safe_open(path, framework="np") as file:
        assert list(file.keys()) == [KEY]
        assert file.metadata() == {KEY: VERSION}
        tensor = file.get_tensor(KEY)
    assert tensor.dtype == np.uint8
    assert tensor.ndim == 1
    # What safetensors asks for is about a hundred bytes.
    assert path.stat().st_size - tensor.size <= 128


def test_the_bill_has_each_weight_in_its_parts(tmp_path):
    contents = small_contents()
    path = saved(tmp_path, to_bytes(contents))
    bill = read(path)[1]
    assert set(bill.parts) == set(PARTS)
    assert [(w.name, w.form, w.shape) for w in bill.weights] == [
        ("a.weight", "direct", (4, 5)),
        ("b.weight", "vq", (4, 4)),
    ]
    for weight in bill.weights:
        assert weight.size_bytes == len(encode_weight(contents.tensors[weight.name])) + 4
    assert sum(w.size_bytes for w in bill.weights) + sum(bill.shared.values()) == path.stat().st_size
    assert min(bill.parts[part] for part in ("codes", "basis", "tables", "steps", "small tensors", "exact tensors")) > 0


def exact_tensors():
    rng = np.random.default_rng(0)
    tensors = {}
    for dtype in DTYPES:
        held = np.dtype(NUMPY_DTYPES[dtype])
        raw = rng.integers(0, 2 if dtype == "bool" else 256, 24 * held.itemsize, np.uint8).tobytes()
        if dtype == "bfloat16":
            raw = (np.frombuffer(raw, "<u4") & 0xFFFF0000).tobytes()
        for shape in ((2, 3, 4), (24,), (1, 24, 1)):
            # Any bits at all, those of NaN and -0.0 among them.
            tensors[f"{dtype}.{shape}"] = (dtype, np.frombuffer(raw, held).reshape(shape))
        tensors[f"{dtype}.no axes"] = (dtype, np.frombuffer(raw, held, 1).reshape(()))
        tensors[f"{dtype}.empty"] = (dtype, np.zeros((0,), held))
        tensors[f"{dtype}.empty too"] = (dtype, np.zeros((3, 0, 2), held))
    return tensors


def test_exact_tensors_of_every_dtype_come_back_bit_for_bit(tmp_path):
    tensors = exact_tensors()
    contents = contents_of({n: v for n, (_, v) in tensors.items()}, {}, {n: d for n, (d, _) in tensors.items()})
    laws.assert_file_law(contents, tmp_path)


def test_the_limits_of_integers_and_not_a_number_come_back(tmp_path):
    tensors = {
        "int64": np.array([-(2**63), 2**63 - 1, 2**53 + 1], np.int64),
        "uint64": np.array([2**64 - 1], np.uint64),
        "float64": np.array([np.nan, -0.0, np.inf, 5e-324, np.nextafter(1, 2)], np.float64),
        "bool": np.array([[True, False]]),
    }
    laws.assert_file_law(contents_of(tensors), tmp_path)


def test_an_exact_tensor_in_another_order_in_memory_comes_back(tmp_path):
    values = np.arange(24, dtype=np.int32).reshape(4, 6)
    found = {}
    for name, view in {
        "transposed": values.T,
        "stepped": values[::2, ::3],
        "fortran": np.asfortranarray(values),
    }.items():
        write(tmp_path / "f.fpk", to_bytes(contents_of({"x": view})))
        found[name] = read(tmp_path / "f.fpk")[0].tensors["x"]
        assert np.array_equal(found[name], view)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float32"])
def test_the_names_of_dtypes_come_back_for_weights_and_small_tensors(dtype, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"w": laws.weight(rng, "direct", Tiling((4, 5))), "b": laws.vector(rng, (3,), True)}
    laws.assert_file_law(contents_of(tensors, {"t": "w"}, {"w": dtype, "b": dtype}), tmp_path)


def test_ties_come_back_tied_whatever_they_are_tied_to(tmp_path):
    contents = small_contents()
    ties = {"z1": "a.weight", "z2": "a.bias", "z3": "steps", "z4": "a.weight"}
    tied = contents_of(contents.tensors, ties)
    laws.assert_file_law(tied, tmp_path)
    assert read(tmp_path / "law.fpk")[0].aliases == ties
    # A tie is a place and a name in the index, not a copy.
    assert len(to_bytes(tied)) - len(to_bytes(contents_of(contents.tensors))) < 40


def test_equal_contents_give_equal_bytes_and_records_at_hand_change_nothing():
    first, second = random_contents(3), random_contents(3)
    assert first is not second
    assert to_bytes(first) == to_bytes(second)
    weights = [v for v in first.tensors.values() if isinstance(v, FactoredWeight)]
    assert to_bytes(first, [encode_weight(w) for w in weights]) == to_bytes(first)
    code = (
        "import hashlib, sys; from container.test_container import random_contents, to_bytes;"
        "print(hashlib.sha256(to_bytes(random_contents(3))).hexdigest())"
    )
    digests = set()
    for hash_seed in ("1", "2"):
        path = os.pathsep.join([*(str(p) for p in (TESTS, TESTS.parent / "src")), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1


TESTS = Path(__file__).resolve().parents[1]


def residual_network():
    """Names, shapes and kinds of a residual network of 120 tensors."""
    rng = np.random.default_rng(0)
    tensors = {}

    def block(prefix, outputs, inputs, kernel):
        tensors[f"{prefix}.weight"] = laws.weight(rng, "direct", Tiling((outputs, inputs, kernel, kernel)))
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{prefix.replace('conv', 'bn')}.bn.{part}"] = laws.vector(rng, (outputs,), part == "running_var")
        tensors[f"{prefix.replace('conv', 'bn')}.bn.num_batches_tracked"] = np.array(1000, np.int64)

    block("conv1", 16, 3, 3)
    for layer, width in ((1, 16), (2, 32), (3, 64)):
        for unit in range(3):
            for conv in (1, 2):
                block(f"layer{layer}.{unit}.conv{conv}", width, width, 3)
    block("layer2.0.shortcut", 32, 16, 1)
    tensors["linear.weight"] = laws.weight(rng, "direct", Tiling((10, 64)))
    tensors["linear.bias"] = laws.vector(rng, (10,), False)
    return dict(islice(tensors.items(), 118)) | {n: tensors[n] for n in ("linear.weight", "linear.bias")}


def test_the_index_takes_a_few_bytes_a_tensor_beside_the_names(tmp_path):
    tensors = residual_network()
    assert len(tensors) == 120
    names = len(deflate("\n".join(tensors).encode()))
    write(tmp_path / "net.fpk", to_bytes(contents_of(tensors)))
    index = read(tmp_path / "net.fpk")[1].parts["index"]
    assert index <= names + 8 * len(tensors)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = to_bytes(small_contents())
    path = tmp_path / "cut.fpk"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(FormatError):
        read(path)


def test_a_file_with_any_bit_flipped_is_refused(tmp_path):
    contents = small_contents()
    data = to_bytes(contents)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    path = tmp_path / "flipped.fpk"
    unharmed = []
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found, _ = read(path)
        except FormatError:
            continue
        unharmed.append(bit // 8)
        laws.assert_same_contents(found, contents)
    # Only the blanks that fill up safetensors' own header mean nothing.
    assert all(place < header and data[place:header].strip() == b"" for place in unharmed)


def test_a_damaged_tensor_is_named(tmp_path):
    contents = small_contents()
    data = bytearray(to_bytes(contents))
    record = encode_weight(contents.tensors["b.weight"])
    data[data.find(record) + len(record) // 2] ^= 1
    with pytest.raises(FormatError, match=r"b\.weight.*checksum"):
        read(saved(tmp_path, data))


def test_an_open_file_gives_what_reading_gives_and_reads_nothing_else(tmp_path):
    contents = small_contents()
    data = bytearray(to_bytes(contents))
    whole = File(saved(tmp_path, bytes(data)))
    for name in (*contents.tensors, *contents.aliases):
        found = (
            contents_of({"x": whole.tensor(name)}),
            contents_of({"x": contents.tensors[contents.aliases.get(name, name)]}),
        )
        laws.assert_same_contents(*found)
        assert whole.shapes[name] == found[0].tensors["x"].shape
    assert whole.dtypes == contents.dtypes
    with pytest.raises(KeyError):
        whole.tensor("d.weight")


@pytest.mark.parametrize(
    ("name", "record", "told"),
    [
        ("b.weight", encode_weight(small_contents().tensors["b.weight"]), r"tensor b\.weight: .*checksum"),
        ("a.bias", encode_vectors([small_contents().tensors["a.bias"]]), "record of the small tensors.*checksum"),
        ("steps", deflate(small_contents().tensors["steps"].tobytes()), "record of the exact tensors.*checksum"),
    ],
)
def test_damage_of_a_record_meets_who_asks_for_its_tensors_and_nobody_else(name, record, told, tmp_path):
    contents = small_contents()
    data = bytearray(to_bytes(contents))
    data[data.rfind(record) + len(record) // 2] ^= 1
    file = File(saved(tmp_path, data))
    for other in contents.tensors.keys() - {name}:
        file.tensor(other)
    with pytest.raises(FormatError, match=told):
        file.tensor(name)
    with pytest.raises(KeyError):
        file.tensor("d.weight")


@pytest.mark.parametrize("blob", [b"", bytes(4), struct.pack("<III", 5, 5, 0), struct.pack("<III", 0, 0, 0)])
def test_a_blob_of_hardly_anything_is_refused(blob, tmp_path):
    with pytest.raises(FormatError):
        read(saved(tmp_path, save({KEY: np.frombuffer(blob, np.uint8)}, metadata={KEY: VERSION})))


def test_an_open_file_allows_each_tensor_the_same_memory(tmp_path):
    index = index_of([WEIGHT], [0], [(1000, 1000)], [len(DENSE_ZEROS)], ["x"])
    file = File(saved(tmp_path, crafted(index, [DENSE_ZEROS])), most_bytes=8_100_000)
    for _ in range(3):
        assert file.tensor("x").shape == (1000, 1000)
        assert file.contents()[1] == file.bill() == read(file.path)[1]
    with pytest.raises(FormatError, match="more memory"):
        File(file.path, most_bytes=8_000_000).tensor("x")


def with_metadata(metadata, tensors=None):
    return save(tensors or {KEY: np.frombuffer(blob_of(to_bytes(small_contents())), np.uint8)}, metadata=metadata)


def blob_of(data):
    return data[8 + struct.unpack("<Q", data[:8])[0] :]


@pytest.mark.parametrize("version", ["0.2", "1.0", "99", "", "0", "0.1.1", "zero"])
def test_another_version_is_refused_by_name(version, tmp_path):
    with pytest.raises(FormatError, match=f"version {version}; this reader knows {VERSION}"):
        read(saved(tmp_path, with_metadata({KEY: version})))


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        (None, None),
        ({}, None),
        ({"format": "pt"}, None),
        ({KEY: VERSION}, {"other": np.zeros(20, np.uint8)}),
        ({KEY: VERSION}, {KEY: np.zeros(20, np.uint8), "other": np.zeros(2, np.uint8)}),
        ({KEY: VERSION}, {KEY: np.zeros(20, np.int8)}),
        ({KEY: VERSION}, {KEY: np.zeros(20, np.float32)}),
        ({KEY: VERSION}, {KEY: np.zeros((4, 5), np.uint8)}),
        ({KEY: VERSION}, {KEY: np.zeros((), np.uint8)}),
    ],
)
def test_a_safetensors_file_of_another_kind_is_refused(metadata, tensors, tmp_path):
    with pytest.raises(FormatError, match="not one of Factorpack's"):
        read(saved(tmp_path, with_metadata(metadata, tensors)))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F4"])
def test_a_dtype_that_numpy_lacks_is_refused(dtype, tmp_path):
    size = {"BF16": 2, "F8_E4M3": 1, "F4": 0.5}[dtype]
    entry = {"dtype": dtype, "shape": [16], "data_offsets": [0, int(16 * size)]}
    head = json.dumps({"__metadata__": {KEY: VERSION}, KEY: entry}).encode()
    with pytest.raises(FormatError):
        read(saved(tmp_path, struct.pack("<Q", len(head)) + head + bytes(int(16 * size))))


@pytest.mark.parametrize("data", [b"", b"no", b"PK\3\4" + bytes(100), b"{}" * 50, b"\x93NUMPY" + bytes(200)])
def test_what_is_no_such_file_is_refused(data, tmp_path):
    with pytest.raises(FormatError, match="damaged, truncated or not a Factorpack file"):
        read(saved(tmp_path, data))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        read(tmp_path / "none.fpk")
    with pytest.raises(FormatError):
        read(tmp_path)


def crafted(index, parts=(), index_bytes=None):
    """A file whose checksums are right, so that only what it says can be wrong."""
    stored = deflate(index)
    size = len(index) if index_bytes is None else index_bytes
    blob = struct.pack("<III", len(stored), size, zlib.crc32(stored)) + stored
    for part in parts:
        blob += part + struct.pack("<I", zlib.crc32(part))
    return save({KEY: np.frombuffer(blob, np.uint8)}, metadata={KEY: VERSION})


def index_of(kinds, dtypes, shapes, sizes, names, targets=(), ties=None):
    out = bytearray()
    append_varint(out, len(shapes))
    append_varint(out, len(targets))
    out += bytes(kinds) + bytes([3]) * (len(targets) if ties is None else ties) + bytes(dtypes)
    for number in (*map(len, shapes), *(s for shape in shapes for s in shape), *targets, *sizes):
        append_varint(out, number)
    return bytes(out) + "\n".join(names).encode()


BYTE = deflate(b"\7")


def test_a_file_made_by_hand_is_read(tmp_path):
    index = index_of([EXACT], [DTYPES.index("uint8")], [(1,)], [len(BYTE)], ["x", "y"], [0])
    found, _ = read(saved(tmp_path, crafted(index, [BYTE])))
    assert found.tensors["x"].tolist() == [7]
    assert found.aliases == {"y": "x"}


# Streams of one symbol are as short for any number of integers.
ZEROS, GRID = encode_integers(np.zeros((1, 1), np.int32)), bytes([2, 0])
DENSE_ZEROS = bytes([FORMS.index("direct"), 0]) + GRID + GRID + ZEROS
WIDE_ZEROS = bytes([FORMS.index("svd"), 0]) + GRID + b"\xff\xff\x03" + ZEROS + GRID + ZEROS
# Kind 1 with an escape, of two symbols, 0 and 1, both of byte 8; an escape of byte 0; one lane and no word.
NEVER_ESCAPED = DENSE_ZEROS[: -len(ZEROS)] + bytes([0, 7, 0, 8, 8, 0, 0, 0]) + struct.pack("<I", 1 << 16) + b"\0"
UINT8 = DTYPES.index("uint8")
LYING = {
    "a kind that is unknown": (
        index_of([4], [UINT8], [(1,)], [len(BYTE)], ["x"]),
        [BYTE],
        "kinds of tensors that are unknown",
    ),
    "a tie among the tensors": (
        index_of([3], [UINT8], [(1,)], [len(BYTE)], ["x"]),
        [BYTE],
        "kinds of tensors that are unknown",
    ),
    "a weight of integers": (
        index_of([WEIGHT], [UINT8], [(3, 4)], [len(DENSE_ZEROS)], ["x"]),
        [DENSE_ZEROS],
        "a factored tensor has a dtype other than",
    ),
    "a small tensor of truths": (
        index_of([VECTOR], [DTYPES.index("bool")], [(3,)], [len(ZEROS) * 4], "x"),
        [ZEROS * 4],
        "a factored tensor has a dtype other than",
    ),
    "a truth of two": (
        index_of([EXACT], [DTYPES.index("bool")], [(1,)], [len(deflate(b"\2"))], "x"),
        [deflate(b"\2")],
        "holds what is no bool",
    ),
    "a bfloat16 of 32 bits": (
        index_of([EXACT], [DTYPES.index("bfloat16")], [()], [len(deflate(b"\1\0\0\0"))], "x"),
        [deflate(b"\1\0\0\0")],
        "holds what is no bfloat16",
    ),
    "groups of one": (
        index_of([WEIGHT], [0], [(3, 4)], [len(DENSE_ZEROS) + 1], "x"),
        [DENSE_ZEROS[:1] + b"\2\1" + DENSE_ZEROS[2:]],
        "flags 2 do not fit 1 groups",
    ),
    "a depth of nothing": (
        index_of([WEIGHT], [0], [(3, 4)], [len(DENSE_ZEROS) + 1], "x"),
        [DENSE_ZEROS[:1] + b"\4\0" + DENSE_ZEROS[2:]],
        "flags 4 do not fit .* a depth of 0",
    ),
    "an escape that never comes": (
        index_of([WEIGHT], [0], [(3, 4)], [len(NEVER_ESCAPED)], "x"),
        [NEVER_ESCAPED],
        "an escape that never comes",
    ),
    "a dtype that is unknown": (
        index_of([EXACT], [len(DTYPES)], [(1,)], [len(BYTE)], ["x"]),
        [BYTE],
        "dtypes that are unknown",
    ),
    "a name too few": (
        index_of([EXACT], [UINT8], [(1,)], [len(BYTE)], ["x"], [0]),
        [BYTE],
        "names of the index do not fit",
    ),
    "a name too many": (
        index_of([EXACT], [UINT8], [(1,)], [len(BYTE)], ["x", "y"]),
        [BYTE],
        "names of the index do not fit",
    ),
    "a name twice": (
        index_of([EXACT], [UINT8], [(1,)], [len(BYTE)], ["x", "x"], [0]),
        [BYTE],
        "names of the index do not fit",
    ),
    "a tie to nothing": (
        index_of([EXACT], [UINT8], [(1,)], [len(BYTE)], ["x", "y"], [1]),
        [BYTE],
        "names of the index do not fit",
    ),
    "names that are not text": (
        index_of([EXACT], [UINT8], [(1,)], [len(BYTE)], [""]) + b"\xff",
        [BYTE],
        "names are not UTF-8",
    ),
    "names of nothing": (index_of([], [], [], [], ["x"]), [], "names of the index do not fit"),
    "a record that is missing": (
        index_of([EXACT], [UINT8], [(1,)], [len(BYTE)], ["x"]),
        [],
        "tells of 29 bytes, and there are 22",
    ),
    "a record too many": (
        index_of([EXACT], [UINT8], [(1,)], [len(BYTE)], ["x"]),
        [BYTE, BYTE],
        "tells of 29 bytes, and there are 36",
    ),
    "a record that is too short": (
        index_of([EXACT], [UINT8], [(2,)], [len(BYTE)], ["x"]),
        [BYTE],
        "does not have the 2 bytes",
    ),
    "a record that is too long": (
        index_of([EXACT], [UINT8], [()], [len(deflate(b"12"))], ["x"]),
        [deflate(b"12")],
        "does not have the 1 bytes",
    ),
    "a record that is not deflated": (
        index_of([EXACT], [UINT8], [(1,)], [8], ["x"]),
        [b"\xff" * 8],
        r"exact tensors is damaged \(.*invalid block type",
    ),
    "a record with a tail": (
        index_of([EXACT], [UINT8], [(1,)], [len(BYTE) + 1], ["x"]),
        [BYTE + b"\0"],
        "does not have the 1 bytes",
    ),
    "too many axes": (
        index_of([EXACT], [UINT8], [(1,) * (MAX_AXES + 1)], [len(BYTE)], ["x"]),
        [BYTE],
        "more than 16 axes",
    ),
    "entries without end": (
        index_of([EXACT], [UINT8], [(2**31,) * 16], [len(BYTE)], ["x"]),
        [BYTE],
        "more than 4294967296 entries",
    ),
    "no entries, of axes without end": (
        index_of([EXACT], [UINT8], [(0, *(2**31,) * 15)], [2], ["x"]),
        [deflate(b"")],
        "more than 4294967296 entries",
    ),
    "a weight without axes": (index_of([WEIGHT], [0], [()], [3], ["x"]), [bytes(3)], "two or more axes"),
    "a weight of nothing": (index_of([WEIGHT], [0], [(2, 2)], [0], ["x"]), [b""], "2 bytes are needed and 0 are left"),
    "a weight as large as all memory": (
        index_of([WEIGHT], [0], [(2**31, 2**31)], [9], ["x"]),
        [bytes(9)],
        "more than 4294967296 entries",
    ),
    "small tensors as large as all memory": (
        index_of([VECTOR] * 3, [0] * 3, [(2**31,)] * 3, [len(encode_integers(np.zeros((1, 3), np.int32))) * 4], "abc"),
        [encode_integers(np.zeros((1, 3), np.int32)) * 4],
        "would take more memory",
    ),
    "a weight with a tail": (
        index_of([WEIGHT], [0], [(4, 5)], [len(encode_weight(small_contents().tensors["a.weight"])) + 1], ["x"]),
        [encode_weight(small_contents().tensors["a.weight"]) + b"\0"],
        "followed by 1 bytes that do not belong there",
    ),
    "more tensors than bytes": (b"\xff\xff\xff\xff\x0f\0", [], "the index would take more memory"),
    "an empty index": (b"", [], "1 bytes are needed and 0 are left"),
}


@pytest.mark.parametrize("lie", LYING)
def test_an_index_that_lies_is_refused(lie, tmp_path):
    index, parts, why = LYING[lie]
    with pytest.raises(FormatError, match=why):
        read(saved(tmp_path, crafted(index, parts)))


def test_an_index_that_is_not_deflated_is_refused(tmp_path):
    stored = b"\xff" * 8
    blob = struct.pack("<III", len(stored), 8, zlib.crc32(stored)) + stored
    with pytest.raises(FormatError, match=r"the index is damaged \(.*invalid block type"):
        read(saved(tmp_path, save({KEY: np.frombuffer(blob, np.uint8)}, metadata={KEY: VERSION})))


def test_a_size_of_the_index_that_lies_is_refused(tmp_path):
    index = index_of([EXACT], [UINT8], [(1,)], [len(BYTE)], ["x"])
    for size in (0, len(index) - 1, len(index) + 1, 2**32 - 1):
        with pytest.raises(FormatError):
            read(saved(tmp_path, crafted(index, [BYTE], size)))


def test_an_index_cut_anywhere_is_refused(tmp_path):
    index = index_of([EXACT, EXACT], [UINT8, 4], [(1,), (2, 0)], [len(BYTE)], ["x", "yy", "z"], [0])
    read(saved(tmp_path, crafted(index, [BYTE])))
    for length in range(len(index) - 1):
        with pytest.raises(FormatError):
            read(saved(tmp_path, crafted(index[:length], [BYTE])))


BOMBS = {
    "a dense tensor": (index_of([WEIGHT], [0], [(2**15, 2**15)], [len(DENSE_ZEROS)], ["x"]), [DENSE_ZEROS]),
    "factors of a small tensor": (index_of([WEIGHT], [0], [(1, 2**16)], [len(WIDE_ZEROS)], ["x"]), [WIDE_ZEROS]),
    "a small tensor": (index_of([VECTOR], [0], [(2**31,)], [len(ZEROS) * 4], ["x"]), [ZEROS * 4]),
    "an exact tensor": (index_of([EXACT], [UINT8], [(2**31,)], [len(BYTE)], ["x"]), [BYTE]),
    "tensors without end": (b"\x80\x80\x80\x04\0" + bytes(2**23), []),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_that_asks_for_more_memory_than_its_size_allows_is_refused_before_that_is_used(bomb, tmp_path):
    path = saved(tmp_path, crafted(*BOMBS[bomb]))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="more memory.*most_bytes"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_who_trusts_a_file_can_allow_it_more_memory_and_who_does_not_less(tmp_path):
    index = index_of([WEIGHT], [0], [(1000, 1000)], [len(DENSE_ZEROS)], ["x"])
    path = saved(tmp_path, crafted(index, [DENSE_ZEROS]))
    # The dense tensor and its integers, four bytes an entry each, and what the index takes.
    with pytest.raises(FormatError, match="more memory than the 8,000,000 bytes"):
        read(path, most_bytes=8_000_000)
    assert not read(path, most_bytes=8_100_000)[0].tensors["x"].tensor().any()
    with pytest.raises(FormatError, match="more memory"):
        factorpack.load_state_dict(path, most_bytes=8_000_000)


def test_what_the_file_has_no_place_for_is_refused():
    with pytest.raises(UnsupportedError, match="line break"):
        to_bytes(contents_of({"a\nb": np.zeros(1, np.int8)}))
    with pytest.raises(UnsupportedError, match="line break"):
        to_bytes(contents_of({"a": np.zeros(1, np.int8)}, {"b\n": "a"}))
    with pytest.raises(UnsupportedError, match="float8_e4m3fn"):
        to_bytes(contents_of({"a": laws.vector(np.random.default_rng(0), (3,), False)}, {}, {"a": "float8_e4m3fn"}))
    with pytest.raises(UnsupportedError, match="17 axes"):
        to_bytes(contents_of({"a": np.zeros((1,) * (MAX_AXES + 1), np.int8)}))


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = saved(tmp_path, b"old")
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_alone(broken, tmp_path, monkeypatch):
    path = saved(tmp_path, b"old")

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fails)
    with pytest.raises(FactorpackError, match="No space left"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_is_interrupted_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = saved(tmp_path, b"old")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_alone(tmp_path):
    path = saved(tmp_path, b"old")

    code = (
        "import sys; from pathlib import Path; from factorpack.container import write\n"
        "from factorpack.errors import FactorpackError\n"
        "try: write(Path(sys.argv[1]), bytes(100_000))\n"
        "except FactorpackError as error: sys.exit(f'refused: {error}')"
    )

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    search = os.pathsep.join([str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-B", "-c", code, str(path)],
        capture_output=True, text=True, check=False, preexec_fn=limited, env=os.environ | {"PYTHONPATH": search},
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    assert "refused: cannot write" in run.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_said(tmp_path):
    with pytest.raises(FactorpackError, match="does the folder exist"):
        write(tmp_path / "none" / "file.fpk", b"new")
