"""The command line: what it prints, what it writes, and one line for whatever is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import factorpack
from factorpack.cli import app
from factorpack.errors import UnsupportedError
from factorpack.sizes import human, parse_size

COMMANDS = ("compress", "finetune", "curve", "bench", "evaluate", "inspect", "report", "verify", "decompress")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> dict:
    """The object in the last line of what `--json` prints."""
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def process(*arguments: object) -> subprocess.CompletedProcess:
    source = str(Path(factorpack.__file__).parents[1])
    code = "from factorpack.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def assert_one_line(found, *parts: str) -> None:
    """Exit code 1 and the error in a single line of stderr, last of all."""
    code = found.returncode if isinstance(found, subprocess.CompletedProcess) else found.exit_code
    assert code == 1, found.stdout + found.stderr
    lines = found.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert sum("error: " in line for line in lines) == 1
    assert "Traceback" not in found.stdout + found.stderr
    for part in parts:
        assert part in lines[-1]


def write(folder: Path, text: str) -> Path:
    path = folder / "task.py"
    path.write_text(text)
    return path


def test_a_network_goes_there_and_back(digits_task, tmp_path):
    out, dense = tmp_path / "digits.fpk", tmp_path / "digits.safetensors"
    packed = answer("compress", digits_task.path, "--size", "8KB", "--out", out)
    assert packed["size_bytes"] == out.stat().st_size <= 8000
    assert packed["ratio"] == pytest.approx(digits_task.size_bytes / packed["size_bytes"])
    assert packed.keys() >= {"seconds", "evaluation_seconds", "scores", "forms"}
    assert 0 < packed["gaussian_bits_per_weight"] < packed["bits_per_weight"] < 8 * 8000 / 15_000
    assert list(packed["scores"]) == list(digits_task.scores)

    evaluated = answer("evaluate", digits_task.path, out)
    assert evaluated == {
        "size_bytes": packed["size_bytes"],
        "scores": packed["scores"],
        "original": pytest.approx(digits_task.scores, rel=1e-5),
    }

    inspected = answer("inspect", out)
    assert sum(inspected["parts"].values()) == inspected["size_bytes"] == packed["size_bytes"]
    listed = sum(weight["size_bytes"] for weight in inspected["weights"]) + sum(inspected["shared"].values())
    assert listed == packed["size_bytes"]
    assert {weight["name"] for weight in inspected["weights"]} >= {"convolutions.1.weight", "head.weight"}

    assert answer("verify", out) == {
        "ok": True,
        "tensors": len(digits_task.names),
        "size_bytes": packed["size_bytes"],
    }

    assert answer("decompress", out, "--out", dense)["size_bytes"] == dense.stat().st_size
    tensors, expected = load_file(dense), factorpack.load_state_dict(out)
    assert tensors.keys() == expected.keys() == set(digits_task.names)
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def test_people_get_tables_and_sentences(digits_task, digits_file):
    evaluated, inspected, verified = (
        run("evaluate", digits_task.path, digits_file), run("inspect", digits_file), run("verify", digits_file)
    )  # fmt: skip
    assert "accuracy" in evaluated.stdout
    assert "convolutions.1.weight" in inspected.stdout
    assert str(digits_file.stat().st_size) in inspected.stdout
    assert "good, 20 tensors" in verified.stdout
    assert "{" not in evaluated.stdout + inspected.stdout + verified.stdout


def test_the_original_alone_can_be_evaluated(digits_task):
    found = answer("evaluate", digits_task.path)
    assert found == {"size_bytes": None, "scores": {}, "original": pytest.approx(digits_task.scores, rel=1e-5)}


def test_a_process_prints_its_answer_last_and_the_rest_elsewhere(digits_task, digits_file):
    found = process("inspect", digits_file, "--json")
    assert found.returncode == 0
    assert found.stderr == ""
    assert json.loads(found.stdout.splitlines()[-1])["size_bytes"] == digits_file.stat().st_size


def test_a_ratio_is_one_of_the_original_tensors(digits_task, tmp_path):
    found = answer("compress", digits_task.path, "--ratio", "10", "--form", "direct", "--out", tmp_path / "a.fpk")
    assert 10 <= found["ratio"] < 10.1
    assert set(found["forms"]) == {"direct"}


def test_a_file_is_exported_for_onnxruntime(digits_task, digits_file, tmp_path):
    import onnxruntime

    from factorpack.task import load_task

    out = tmp_path / "digits.onnx"
    exported = answer("export", "onnx", digits_task.path, digits_file, "--out", out, "--mode", "stream")
    assert exported.keys() == {"file", "mode", "size_bytes", "dense", "largest_difference"}
    assert exported["size_bytes"] == out.stat().st_size
    assert exported["dense"] == []
    session = onnxruntime.InferenceSession(out)
    task = load_task(str(digits_task.path))

    class Exported(torch.nn.Module):
        def forward(self, images):
            return torch.from_numpy(session.run(None, {"x": images.numpy()})[0])

    found = task.evaluate(Exported())
    assert found == pytest.approx(answer("evaluate", digits_task.path, digits_file)["scores"], abs=1e-4)


def test_an_export_that_cannot_be_says_so(digits_task, digits_file, tmp_path):
    out = tmp_path / "digits.onnx"
    export = ("export", "onnx", digits_task.path, digits_file, "--out")
    assert_one_line(run(*export, tmp_path / "none" / "digits.onnx"), "the folder", "does not exist")
    assert_one_line(run(*export, out, "--mode", "both"), "'both' is no mode of export: choose fold or stream")
    assert_one_line(run("export", "onnx", digits_task.weights, digits_file, "--out", out), "holds weights alone")
    empty = write(tmp_path, "def model(): ...\ndef calibration(): return []\n")
    assert_one_line(run("export", "onnx", empty, digits_file, "--out", out), "holds no batch to call the network with")
    assert not out.exists()


def test_bare_weights_are_compressed_without_data(digits_task, digits_network, tmp_path):
    found = answer("compress", digits_task.weights, "--size", "11.6KB", "--out", tmp_path / "bare.fpk")
    assert found["size_bytes"] <= 11_600
    assert found["scores"] == {}
    network = factorpack.load(tmp_path / "bare.fpk", digits_network)
    scores = factorpack.task.load_task(str(digits_task.path)).evaluate(network)
    assert scores["accuracy"] > 95


def test_a_task_without_calibration_is_compressed_without_data(digits_task, tmp_path):
    text = "import torch\ndef model():\n    return torch.nn.Linear(30, 40)\n"
    found = run("compress", write(tmp_path, text), "--size", "1500", "--out", tmp_path / "a.fpk")
    assert found.exit_code == 0
    assert "task.py has no calibration(): compressing without data" in found.stderr
    assert "bits a weight" not in found.stdout
    assert (tmp_path / "a.fpk").stat().st_size <= 1500


def test_what_is_excluded_is_not_among_the_weights(digits_task, tmp_path):
    out = tmp_path / "a.fpk"
    answer("compress", digits_task.path, "--size", "14KB", "--exclude", "head.*", "--exclude", "norms*", "--out", out)
    names = {weight["name"] for weight in answer("inspect", out)["weights"]}
    assert names == {f"convolutions.{place}.weight" for place in range(3)}


def test_a_curve_is_resumed_and_its_cache_serves_compress(digits_task, tmp_path, short_analysis):
    folder = tmp_path / "sizes"
    wanted = ("curve", digits_task.path, "--size", "6KB", "--size", "4KB", "--form", "direct", "--out", folder)
    found = answer(*wanted)
    assert found == json.loads((folder / "curve.json").read_text())
    assert [point["asked_bytes"] for point in found["points"]] == [4000, 6000]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    (rung,) = folder.glob("*/rung-03.json")
    rung.write_bytes(rung.read_bytes()[:50])
    (folder / "4000.fpk").rename(tmp_path / "before.fpk")
    again = run(*wanted)
    assert "rung-03.json is damaged" in again.stderr.replace("\n", "")
    assert "6 kB" in again.stdout or "5.9" in again.stdout
    data = (tmp_path / "before.fpk").read_bytes()
    assert (folder / "4000.fpk").read_bytes() == data
    command = found["points"][0]["command"].split()
    assert command[:2] == ["factorpack", "compress"]
    (folder / "4000.fpk").unlink()
    answer(*command[1:])
    assert (folder / "4000.fpk").read_bytes() == data


def test_a_drop_of_the_score_chooses_the_size_and_says_what_that_means(digits_task, tmp_path, short_analysis):
    out = tmp_path / "a.fpk"
    found = run("compress", digits_task.path, "--max-drop", "40", "--form", "direct", "--out", out, "--json")
    assert found.exit_code == 0, found.stderr
    assert "chosen by its accuracy on the data of evaluate()" in found.stdout
    assert "not an unbiased one" in found.stdout
    told = json.loads(found.stdout.splitlines()[-1])
    assert told["original"] == pytest.approx(digits_task.scores, rel=1e-5)
    assert told["drop"] == pytest.approx(told["original"]["accuracy"] - told["scores"]["accuracy"])
    assert told["drop"] <= 40
    assert told["evaluations"] == 3
    assert told["score_spread"] >= 0
    stored, gaussian = told["bits_per_weight"], told["gaussian_bits_per_weight"]
    assert f"{stored:.2f} bits a weight; Gaussian reference {gaussian:.2f} at the same loss\n" in found.stdout
    assert told["size_bytes"] == out.stat().st_size
    assert answer("evaluate", digits_task.path, out)["scores"] == told["scores"]


def test_a_plan_goes_out_and_comes_back(digits_task, tmp_path):
    first, second, plan = tmp_path / "a.fpk", tmp_path / "b.fpk", tmp_path / "plan.json"
    answer("compress", digits_task.path, "--size", "5KB", "--seed", 3, "--out", first, "--save-plan", plan)
    answer("compress", digits_task.path, "--plan", plan, "--out", second)
    assert first.read_bytes() == second.read_bytes()
    refused = run("compress", digits_task.path, "--plan", plan, "--exclude", "head.*", "--out", second)
    assert_one_line(refused, "the plan is not of this model: 'head.weight' is only in one of them")
    assert_one_line(
        run("compress", digits_task.path, "--plan", plan, "--form", "direct", "--out", second),
        "a plan says the form of each weight: leave --form, --solver and --rank out",
    )
    plan.write_text(plan.read_text()[:-9])
    assert_one_line(run("compress", digits_task.path, "--plan", plan, "--out", second), "a plan is JSON")
    missing = tmp_path / "missing.json"
    assert_one_line(run("compress", digits_task.path, "--plan", missing, "--out", second), "cannot read the plan")


def test_a_plan_of_ranks_by_vbmf_comes_back(digits_task, tmp_path):
    found, again, plan = tmp_path / "a.fpk", tmp_path / "b.fpk", tmp_path / "plan.json"
    asked = ("--size", "6KB", "--form", "svd", "--rank", "vbmf", "--save-plan", plan)
    assert answer("compress", digits_task.path, *asked, "--out", found)["size_bytes"] <= 6000
    assert json.loads(plan.read_text())["rank_by"] == "vbmf"
    answer("compress", digits_task.path, "--plan", plan, "--out", again)
    assert again.read_bytes() == found.read_bytes()


def test_batch_norms_are_kept_whole_on_demand(digits_task, tmp_path):
    out = tmp_path / "a.fpk"
    answer("compress", digits_task.path, "--size", "8KB", "--keep-batch-norms", "--out", out)
    found, original = factorpack.load_state_dict(out), load_file(digits_task.weights)
    for name in ("norms.0.running_mean", "norms.0.weight"):
        torch.testing.assert_close(found[name], original[name], rtol=0.2, atol=0.1)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--points", "1"), "a curve has 2 to 100 points"),
        (("--size", "ten"), "'ten' is no size"),
        (("--form", "vq"), "there is no analysis of form vq"),
        (("--form", "wavelet"), "'wavelet' is no form"),
    ],
)
def test_a_curve_that_is_wrong_is_one_line(digits_task, tmp_path, arguments, part):
    assert_one_line(run("curve", digits_task.path, *arguments, "--out", tmp_path / "sizes"), part)
    assert not list(tmp_path.iterdir())


def test_what_needs_scores_says_so_at_once(digits_task, tmp_path):
    path = write(tmp_path, "import torch\ndef model():\n    return torch.nn.Linear(30, 40)\n")
    out = tmp_path / "a.fpk"
    assert_one_line(run("compress", path, "--max-drop", "1", "--out", out), "no function evaluate(), which --max-drop")
    assert_one_line(run("curve", path, "--out", out), "no function evaluate(), which a curve needs")
    assert_one_line(run("compress", digits_task.weights, "--max-drop", "1", "--out", out), "holds weights alone")
    assert_one_line(run("curve", digits_task.weights, "--out", out), "holds weights alone")
    (tmp_path / "taken").write_text("")
    made = run("compress", digits_task.path, "--size", "8KB", "--cache", tmp_path / "taken", "--out", out)
    assert_one_line(made, "cannot make the folder")


def test_a_report_is_a_page_and_numbers(digits_task, digits_file, tmp_path):
    out = tmp_path / "report.html"
    found = answer("report", digits_file, "--task", digits_task.path, "--out", out)
    assert found["page"] == str(out)
    assert sum(found["parts"].values()) == found["size_bytes"] == digits_file.stat().st_size
    assert found["comparison"]["original"] == pytest.approx(digits_task.scores, rel=1e-5)
    assert all(layer["measured_loss"]["mean"] > 0 for layer in found["layers"])
    assert f"--task {digits_task.path}" in found["provenance"]["commands"]["This page"]
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "accuracy" in page

    alone = answer("report", digits_file, "--out", out)
    assert alone["comparison"] is None
    assert "accuracy" not in out.read_text(encoding="utf-8")


def test_a_report_of_what_does_not_belong_is_one_line(digits_task, digits_file, tmp_path):
    out, plan = tmp_path / "report.html", tmp_path / "plan.json"
    other = write(tmp_path, "import torch\ndef model():\n    return torch.nn.Linear(3, 4)\n")
    assert_one_line(run("report", digits_file, "--task", other, "--out", out), "the file is for another model")
    plan.write_text('{"rate": 1.0, "seed": 0, "size_bytes": 9, "behind_prefix": true, "rank_by": "rate", "layers": {}}')
    assert_one_line(run("report", digits_file, "--plan", plan, "--out", out), "the plan is of another file")
    assert_one_line(run("report", digits_file, "--task", "no.py", "--out", out), "no task file no.py")
    assert not out.exists()
    text = "from digits_task import *\nfrom digits_task import Network\ndef model():\n    return Network().eval()\n"
    text += "del calibration, evaluate\n"
    untrained = Path(digits_task.path).with_name("untrained.py")
    untrained.write_text(text)
    found = run("report", digits_file, "--task", untrained, "--out", out)
    assert found.exit_code == 0, found.stderr
    assert "was it made from these?" in found.stderr


@pytest.mark.parametrize("command", [*COMMANDS, "export onnx"])
def test_help_shows_an_example(command):
    found = run(*command.split(), "--help")
    assert found.exit_code == 0
    assert f"Example: factorpack {command}" in found.stdout


def test_help_names_every_command():
    found = run("-h")
    assert found.exit_code == 0
    assert all(command in found.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("def model(:\n", "SyntaxError"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
        ("x = 1\n", "has no function model()"),
        ("def model():\n    raise RuntimeError('no weights [here]')\n", "RuntimeError: no weights [here] (task.py:2)"),
        ("def model():\n    return 5\n", "model() returned int"),
        ("def model():\n    import torch\n    return torch.nn.Linear(9, 9)\ndef calibration():\n    1 / 0\n",
         "calibration() failed: ZeroDivisionError"),
        ("def model():\n    import torch\n    return torch.nn.Linear(9, 9)\ndef calibration():\n    return []\n",
         "calibration() gave no batch"),
    ],
)  # fmt: skip
def test_a_task_that_is_wrong_is_one_line(tmp_path, text, part):
    found = run("compress", write(tmp_path, text), "--size", "5KB", "--out", tmp_path / "a.fpk")
    assert_one_line(found, part)
    assert not (tmp_path / "a.fpk").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--size", "12 parsecs"), "'12 parsecs' is no size"),
        (("--size", "1.2.3MB"), "'1.2.3MB' is no size"),
        (("--size", "0"), "'0' is no file"),
        (("--size", "-5"), "'-5' is no size"),
        ((), "either --size 60KB or --ratio 18"),
        (("--size", "8KB", "--ratio", "4"), "either --size 60KB or --ratio 18"),
        (("--max-drop", "-1"), "zero or more, not -1"),
        (("--max-drop", "nan"), "zero or more"),
        (("--max-drop", "1", "--size", "8KB"), "or --max-drop 1, or --plan plan.json"),
        (("--max-drop", "1", "--form", "vq"), "there is no analysis of form vq"),
        (("--size", "8KB", "--save-plan", "nowhere/plan.json"), "choose another --save-plan"),
        (("--ratio", "-3"), "--ratio is a positive number"),
        (("--ratio", "nan"), "--ratio is a positive number"),
        (("--ratio", "1e9"), "cannot be met"),
        (("--size", "100"), "100 bytes cannot be met: the smallest file of this model takes"),
        (("--size", "8KB", "--form", "wavelet"), "'wavelet' is no form: choose auto, direct"),
        (("--size", "8KB", "--solver", "magic"), "'magic' is no solver"),
        (("--size", "8KB", "--solver", "projected-gradient"), "projected gradients need a form"),
        (("--size", "8KB", "--form", "svd", "--rank", "full"), "'full' is no rule for ranks: choose rate or vbmf"),
        (("--size", "8KB", "--rank", "vbmf"), "ranks by vbmf are for form svd"),
        (("--size", "8KB", "--exclude", "tail.*"), "fits no tensor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_question_that_is_wrong_is_one_line(digits_task, tmp_path, arguments, part):
    found = run("compress", digits_task.path, *arguments, "--out", tmp_path / "a.fpk")
    assert_one_line(found, part)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", ["nowhere.py", "nowhere.safetensors", "nowhere", "no_such_module:task"])
def test_a_task_that_is_not_there_is_one_line(tmp_path, spec):
    assert_one_line(run("compress", spec, "--size", "8KB", "--out", tmp_path / "a.fpk"), spec.split(":")[0])


def test_a_folder_that_is_not_there_is_one_line(digits_task, digits_file, tmp_path):
    missing = tmp_path / "missing" / "a.fpk"
    assert_one_line(run("compress", digits_task.path, "--size", "8KB", "--out", missing), "does not exist")
    assert_one_line(run("decompress", digits_file, "--out", missing), "does the folder exist")
    assert not missing.parent.exists()


def test_what_cannot_be_evaluated_is_one_line(digits_task, digits_file, tmp_path):
    text = "import torch\ndef model():\n    return torch.nn.Linear(30, 40)\n"
    assert_one_line(run("evaluate", write(tmp_path, text)), "has no function evaluate()")
    text += "def evaluate(model):\n    return 1.0\n"
    assert_one_line(run("evaluate", write(tmp_path, text), digits_file), "the file is for another model")


@pytest.mark.parametrize("command", ["inspect", "verify", "decompress", "evaluate"])
@pytest.mark.parametrize("kind", ["truncated", "damaged", "another", "bare", "empty", "missing", "folder"])
def test_a_file_that_is_wrong_is_one_line(digits_task, digits_file, tmp_path, command, kind):
    data = digits_file.read_bytes()
    path = tmp_path / "bad.fpk"
    contents = {
        "truncated": data[: len(data) // 2],
        "damaged": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "another": b"PK\x03\x04" + bytes(100),
        "bare": digits_task.weights.read_bytes(),
        "empty": b"",
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path.mkdir()
    before = [digits_task.path] if command == "evaluate" else []
    after = ["--out", tmp_path / "out.safetensors"] if command == "decompress" else []
    assert_one_line(run(command, *before, path, *after))
    assert not (tmp_path / "out.safetensors").exists()


def test_a_process_ends_in_one_line_too(tmp_path):
    assert_one_line(process("verify", tmp_path / "missing.fpk"), "does not exist")
    assert_one_line(process("compress", "nowhere.py", "--size", "8KB", "--out", tmp_path / "a.fpk"), "no task file")


@pytest.mark.parametrize(
    ("text", "size"),
    [("60KB", 60_000), ("5.5 MB", 5_500_000), ("1MiB", 1 << 20), ("60_000", 60_000), ("1,234", 1234), ("7b", 7)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "KB", "ten", "5 XB", "0.1", "-1KB", "1e3", "..", "inf", "5,5MB", "1,23KB", "9" * 400]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UnsupportedError, match="write 60KB"):
        parse_size(text)


def test_sizes_are_written_for_people():
    assert [human(size) for size in (999, 1500, 5_500_000, 2 * 10**9)] == ["999 B", "1.5 kB", "5.5 MB", "2 GB"]


def test_a_path_with_brackets_is_printed_as_it_is(digits_file, tmp_path):
    folder = tmp_path / "r[best]"
    folder.mkdir()
    path = folder / "a[/b].fpk".replace("/", "_")
    path.write_bytes(Path(digits_file).read_bytes())
    result = run("verify", path)
    assert result.exit_code == 0
    assert "r[best]" in result.output.replace("\n", "")


def test_weights_alone_cannot_be_evaluated_and_the_error_says_so(digits_task):
    result = run("evaluate", digits_task.weights)
    assert result.exit_code == 1
    assert "holds weights alone" in result.output.replace("\n", " ")
