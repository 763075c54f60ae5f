"""Do both readers stand what nobody thought of? Fuzzes each for a time; the last line is JSON.

python fuzz/run.py [--minutes 30] [--only python|c]

What fails goes to fuzz/found, where it can be tried again (fuzz/found/read_fpk FILE, python fuzz/read_fpk.py FILE), and
what is worth starting from the next time to fuzz/corpus. At the end both readers are given what was kept for either,
and have to find the same in it. The exit status tells whether anything failed.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

FUZZ = Path(__file__).resolve().parent
TESTS = FUZZ.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "container")]

from c_decoder import CHECKED, SOURCES  # noqa: E402
from damage import FILES, MOST_BYTES, decoded, put_together, taken_apart  # noqa: E402
from test_container import contents_of  # noqa: E402

from factorpack.container import read, to_bytes  # noqa: E402
from factorpack.errors import FormatError  # noqa: E402

READERS = ("python", "c")
FOUND, CORPUS = FUZZ / "found", FUZZ / "corpus"
# Longer files take longer and reach no more: of larger golden files each tensor becomes a file.
LONGEST = 1 << 14
LOG_SHOWN = 4000
FIGURES = {
    "executions": r"stat::number_of_executed_units:\s*(\d+)",
    "seconds": r"Done \d+ runs in (\d+) second",
    "edges": r"cov: (\d+)",
    "features": r"ft: (\d+)",
    "corpus": r"corp: (\d+)",
    "peak MB": r"stat::peak_rss_mb:\s*(\d+)",
}


def seeds() -> list[bytes]:
    files = list(FILES)
    for path in sorted((TESTS / "vectors").glob("*.fpk")):
        files.append(path.read_bytes())
        contents, _ = read(path)
        files += [to_bytes(contents_of({n: v}, {}, {n: contents.dtypes[n]})) for n, v in contents.tensors.items()]
    return [file for file in files if len(file) < LONGEST]


def as_parts(file: bytes) -> bytes:
    """A file as the second kind of input of read_fpk.c."""
    front, records, names = taken_apart(file)
    return b"\1" + b"".join(struct.pack("<H", len(part)) + part for part in (front, *records, names))


def as_file(given: bytes) -> bytes:
    """The file that read_fpk.c makes of an input, but for the way in which its index is deflated; maybe none."""
    if given[:1] != b"\1":
        return given[1:]
    parts, at = [], 1
    while at + 2 <= len(given):
        (size,) = struct.unpack_from("<H", given, at)
        parts.append(given[at + 2 : at + 2 + size])
        at += 2 + size
    return put_together(parts[0], parts[1:-1], parts[-1]) if len(parts) > 1 else b""


def built(main: Path, *flags: str) -> Path:
    program = FOUND / main.stem
    command = ["clang", *CHECKED, *flags, "-I", SOURCES, "-I", TESTS / "container", SOURCES / "factorpack.c", main]
    subprocess.run([*command, "-o", program], check=True)
    return program


def prepared(reader: str) -> list[str | Path]:
    """The command that fuzzes a reader, whose corpus has the seeds."""
    corpus = CORPUS / reader
    corpus.mkdir(parents=True, exist_ok=True)
    for file in seeds():
        for given in (file,) if reader == "python" else (b"\0" + file, as_parts(file)):
            (corpus / hashlib.sha1(given).hexdigest()).write_bytes(given)
    if reader == "python":
        return [sys.executable, FUZZ / "read_fpk.py", corpus]
    return [built(FUZZ / "read_fpk.c", "-fsanitize=fuzzer"), corpus, "-timeout=10"]


def started(reader: str, command: list[str | Path], minutes: float) -> subprocess.Popen:
    limits = [f"-max_total_time={60 * minutes:.0f}", f"-max_len={LONGEST}", "-print_final_stats=1"]
    # As many threads as there are processors would only wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log_of(reader).open("w") as log:
        command = [*command, *limits, f"-artifact_prefix={FOUND}/{reader}-"]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def log_of(reader: str) -> Path:
    return FOUND / f"{reader}.log"


def figures(log: str) -> dict[str, int]:
    """What libFuzzer wrote last of each."""
    found = {name: re.findall(pattern, log) for name, pattern in FIGURES.items()}
    return {name: int(values[-1]) for name, values in found.items() if values}


def disagreements() -> tuple[int, int]:
    """How many files both readers were given, and of how many they make something else; these are kept."""
    kept = [path.read_bytes() for path in sorted((CORPUS / "python").glob("*"))]
    kept += [as_file(path.read_bytes()) for path in sorted((CORPUS / "c").glob("*"))]
    data = b"".join(struct.pack("<I", len(file)) + file for file in kept)
    program = built(TESTS / "container" / "fpk_digests.c")
    run = subprocess.run([program, str(16 * MOST_BYTES)], input=data, capture_output=True, check=False)
    if run.returncode:
        print(run.stderr.decode(errors="replace"))
        (FOUND / "fpk_digests.input").write_bytes(data)
        return len(kept), 1
    differ = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.fpk"
        for file, other in zip(kept, run.stdout.decode().split(), strict=True):
            path.write_bytes(file)
            if mine(path, other) != other:
                differ += 1
                (FOUND / f"differs-{hashlib.sha1(file).hexdigest()}").write_bytes(file)
    return len(kept), differ


def mine(path: Path, other: str) -> str:
    """What this package makes of a file, in the words of `fpk_digests`, which said `other`."""
    try:
        return decoded(path)[1]
    except FormatError as error:
        # How much memory a file may take is up to each reader.
        return other if "more memory" in str(error) else "refused"
    except Exception as error:
        return repr(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--only", choices=READERS)
    options = parser.parse_args()
    if not shutil.which("clang"):
        print("There is no clang, which the decoder in C is fuzzed with: apt-get install clang", file=sys.stderr)
        return 2
    FOUND.mkdir(exist_ok=True)
    commands = {reader: prepared(reader) for reader in READERS if options.only in (None, reader)}
    runs = {reader: started(reader, command, options.minutes) for reader, command in commands.items()}
    report: dict[str, dict[str, int]] = {}
    for reader, run in runs.items():
        failed = run.wait() != 0
        log = log_of(reader).read_text(errors="replace")
        report[reader] = figures(log) | {"failures": int(failed)}
        if failed:
            print(log[-LOG_SHOWN:])
    files, differ = disagreements()
    report["both"] = {"files": files, "failures": differ}
    for name, found in report.items():
        print(f"{name}: " + ", ".join(f"{value:,} {what}" for what, value in found.items()))
    print(json.dumps(report))
    return int(any(found["failures"] for found in report.values()))


if __name__ == "__main__":
    sys.exit(main())
