"""Twenty thousand damaged files: each is refused, or means what it meant; nothing else, in bounded time and memory.

Half of them have their sizes and checksums put right again, so that the parser behind these is reached: there another
result is allowed, as long as its tensors can be made and the decoder in C makes the same. The mutants are the same in
every run; `make fuzz` looks for others.
"""

import resource
import signal
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path

import laws
import numpy as np
import pytest
from c_decoder import built
from damage import CORPUS, FILES, MOST_BYTES, decoded, index_with, mutated, put_together, taken_apart
from test_container import crafted

from factorpack.coding import compiled
from factorpack.errors import FormatError

MUTANTS, PARTS = 20_000, 8
SECONDS = 2.0


@contextmanager
def in_time():
    def late(_signal, _frame):
        raise TimeoutError(f"a damaged file took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(path, data):
    """As `decoded`; None and "refused" where the package refuses."""
    path.write_bytes(data)
    with in_time():
        try:
            return decoded(path)
        except FormatError:
            return None, "refused"


def test_files_come_apart_and_together_again():
    for data in FILES:
        assert put_together(*taken_apart(data)) == data


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    """What the decoder in C makes of files: their lines of `fpk_digests`."""
    program = built(Path(__file__).with_name("fpk_digests.c"), tmp_path_factory.mktemp("c"))

    def found(files):
        data = b"".join(struct.pack("<I", len(file)) + file for file in files)
        run = subprocess.run([program, str(16 * MOST_BYTES)], input=data, capture_output=True, check=False, timeout=300)
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout.decode().split()

    return found


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_file_is_refused_or_means_what_it_meant(part, digests, tmp_path, monkeypatch):
    if part % 2:
        # Half of them by the decoder in Python, which there is where no compiler was.
        monkeypatch.setattr(compiled, "library", lambda: None)
    rng = np.random.default_rng(part)
    path = tmp_path / "mutant.fpk"
    apart = [taken_apart(data) for data in FILES]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    tried, found_here = [], []
    for _ in range(MUTANTS // PARTS // 2):
        which = int(rng.integers(len(FILES)))
        tried.append(mutated(rng, FILES[which], FILES[int(rng.integers(len(FILES)))]))
        contents, digest = outcome(path, tried[-1])
        if contents is not None:
            laws.assert_same_contents(contents, CORPUS[which])
        refused += contents is None
        found_here.append(digest)
        front, records, names = apart[which]
        place = int(rng.integers(-1, len(records)))
        if place < 0:
            index = index_with(front, records, names)
            tried.append(crafted(mutated(rng, index, index), records))
        else:
            changed = list(records)
            changed[place] = mutated(rng, records[place], records[int(rng.integers(len(records)))])
            tried.append(put_together(front, changed, names))
        found_here.append(outcome(path, tried[-1])[1])
    # Nearly all of what is damaged is refused; what is not was changed where nothing is said.
    assert refused > 0.9 * (MUTANTS // PARTS // 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (4 * MOST_BYTES + (64 << 20)) // 1024
    assert found_here == digests(tried)
