"""How many branches of the reader do its tests take? The last line is JSON; fails where it is less than 95 %.

python bench/branches.py        needs coverage, see requirements/fuzz.txt

The damaged files of tests/container/test_fuzz.py are left out: what they reach by chance is not asserted one by one.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST = 95.0
READER = [
    "container/reader.py",
    *(f"coding/{name}.py" for name in ("reader", "records", "streams", "models", "rans", "reference", "escapes")),
]
TESTS = ["tests/container", "tests/coding", "tests/test_golden.py", "--ignore=tests/container/test_fuzz.py"]


def measured(folder: Path) -> dict:
    # Checks of shapes add branches of their own to every call.
    environment = os.environ | {"COVERAGE_FILE": str(folder / "data"), "FACTORPACK_NO_SHAPE_CHECKS": "1"}

    def coverage(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, env=environment, check=True)

    files = ",".join(f"*/factorpack/{name}" for name in READER)
    coverage("run", "--branch", f"--include={files}", "-m", "pytest", "-q", *TESTS)
    coverage("json", "-q", "-o", str(folder / "report.json"))
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = measured(Path(folder))
    for name, file in report["files"].items():
        missing = ", ".join(f"{start} to {end}" for start, end in file["missing_branches"]) or "none"
        lines = ", ".join(map(str, file["missing_lines"])) or "none"
        summary = file["summary"]
        print(f"{name}: {summary['covered_branches']} of {summary['num_branches']} branches")
        print(f"    not taken, by line: {missing}; lines not run: {lines}")
    totals = report["totals"]
    percent = 100 * totals["covered_branches"] / totals["num_branches"]
    print(json.dumps({"branches": totals["num_branches"], "taken": totals["covered_branches"], "percent": percent}))
    return int(percent < LEAST)


if __name__ == "__main__":
    sys.exit(main())
