import json
import os
import subprocess
import sys

import pytest
import torch

import mfkernels
from mfkernels import cli


def _run(*arguments, **environment):
    command = [sys.executable, "-m", "mfkernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_info_says_what_a_bug_report_needs():
    done = _run("info", MFKERNELS_ISA="generic")
    assert done.returncode == 0, done.stderr
    for part in (
        mfkernels.__version__,
        torch.__version__,
        "generic of",
        "backend triton",
        "backend cpu",
        "GPU",
    ):
        assert part in done.stdout


def test_an_unknown_instruction_set_in_the_environment_is_an_error():
    done = _run("info", MFKERNELS_ISA="sse9")
    assert done.returncode != 0
    assert "MFKERNELS_ISA" in done.stderr and "'sse9'" in done.stderr


def test_demo(tmp_path, capsys, monkeypatch):
    from mfkernels import demo

    monkeypatch.setattr(demo, "SECONDS", 0.1)
    monkeypatch.setattr(demo, "SIZES", (64, 96))
    assert cli.main(["demo", "--model", "mobile_former_26m", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "64x64" in printed and "agree" in printed and "DIFFER" not in printed
    result = json.loads((tmp_path / "demo.json").read_text())
    assert [row["size"] for row in result["rows"]] == [64, 96]
    for row in result["rows"]:
        assert row["top5_agree"] and 0 <= row["max_rel_difference"] < 1e-4
        assert row["speed_up"] == row["reference_ms"] / row["mfkernels_ms"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.jpg"], "none.jpg"),
        (["--checkpoint", "none.pth"], "none.pth"),
        (["--model", "resnet50"], "mobile_former_26m"),
    ],
)
def test_demo_with_a_wrong_argument_says_so_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *arguments])
    assert stop.value.code != 0
    assert message in capsys.readouterr().err.splitlines()[-1]
