"""Files to the reader in Python, chosen by what of its code they reach: a target for atheris, which fuzz/run.py runs.

python fuzz/read_fpk.py FOLDER... [-runs=N]      goes on from the files of the folders
python fuzz/read_fpk.py FILE                     tries one file again

A file is refused with FormatError, or all of its tensors can be made, and are the same when asked for one by one.
Whatever else happens, warnings included, is a failure, and so are more than two seconds of processor time, or more
memory than four times MOST_BYTES and 64 MiB on top of what the process had before.
"""

import os
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import atheris

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "container")]
READERS = ["factorpack.container", "factorpack.coding", "factorpack.factors", "factorpack.tiling"]

with atheris.instrument_imports(include=READERS):
    import laws
    import numpy as np
    from damage import FILES, MOST_BYTES, decoded, index_with, mutated, put_together, taken_apart
    from test_container import crafted

    from factorpack.container import Contents, File
    from factorpack.errors import FormatError

SECONDS = 2.0
ROOM = 4 * MOST_BYTES + (64 << 20)
# A file without a place on any disk.
HANDLE = os.memfd_create("mutant")
PATH = Path(f"/proc/self/fd/{HANDLE}")
RECORDS = [record for file in FILES for record in taken_apart(file)[1]]


def one_by_one() -> Contents | None:
    try:
        file = File(PATH, MOST_BYTES)
        return Contents({name: file.tensor(name) for name in file.shapes}, file.dtypes, file.aliases)
    except FormatError:
        return None


def try_file(data: bytes) -> None:
    os.ftruncate(HANDLE, 0)
    os.pwrite(HANDLE, data, 0)
    # Lets the kernel begin anew with the most memory that the process has had.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    memory, began = peak(), time.process_time()
    singly = one_by_one()
    try:
        together, _ = decoded(PATH)
    except FormatError:
        # All tensors together may take more memory than each alone.
        together = None
    assert time.process_time() - began < SECONDS, "took too long"
    assert peak() - memory < ROOM, "took too much memory"
    if together is not None:
        assert singly is not None, "is refused tensor by tensor"
        tensors = {name: singly.tensors[name] for name in together.tensors}
        laws.assert_same_contents(Contents(tensors, singly.dtypes, singly.aliases), together)


def peak() -> int:
    """Bytes of memory that this process has had at most since the kernel began anew; getrusage keeps its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def changed(rng: np.random.Generator, data: bytes, most: int) -> bytes:
    """By libFuzzer, which knows what the reader compared, or with bytes from elsewhere."""
    if rng.integers(2):
        return bytes(atheris.Mutate(data, most))
    return mutated(rng, data, RECORDS[int(rng.integers(len(RECORDS)))])


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Half of the mutants are changed anywhere, half behind their checksums, in the index or in a record."""
    rng = np.random.default_rng(seed)
    try:
        front, records, names = taken_apart(data)
    except (FormatError, zlib.error, struct.error):
        return bytes(atheris.Mutate(data, most))
    place = int(rng.integers(-1, len(records)))
    if rng.integers(2):
        found = changed(rng, data, most)
    elif place < 0:
        found = crafted(changed(rng, index_with(front, records, names), most), records)
    else:
        records[place] = changed(rng, records[place], most)
        found = put_together(front, records, names)
    return found if len(found) <= most else bytes(atheris.Mutate(data, most))


def main() -> None:
    warnings.simplefilter("error")
    # What libFuzzer and atheris keep grows with time, so its own limit of memory says little. It ends what never does.
    limits = ["-timeout=60", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], try_file, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
