import json
import lzma
import os
import subprocess
import sys

import pytest
import torch
from released_data import DATA

import mfkernels
from mfkernels import _C, cli


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


def test_bench(tmp_path, capsys):
    options = ["--networks", "mobile_former_26m,shufflenet_v2_2x", "--runtimes", "mfkernels,eager"]
    sizes = ["--sizes", "64,96", "--seconds", "0.1", "--output", str(tmp_path)]
    assert cli.main(["bench", *options, *sizes]) == 0
    printed = capsys.readouterr()
    assert "shufflenet_v2_2x in mfkernels, float32: skipped" in printed.err
    assert "ours / best other" in printed.out
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 3
    for line in lines:
        assert line["cpu"] and line["threads"] == 1 and line["low_ms"] <= line["median_ms"] <= line["high_ms"]
        assert 0 <= line["difference"] < 1e-4
    assert (tmp_path / "sizes.png").exists() and (tmp_path / "networks-64.png").exists()


def test_bench_in_bfloat16(tmp_path, capsys):
    options = [
        "--networks",
        "mobile_former_26m",
        "--runtimes",
        "mfkernels,eager,onnxruntime",
        "--sizes",
        "64",
    ]
    assert (
        cli.main(["bench", *options, "--dtype", "bfloat16", "--seconds", "0.1", "--output", str(tmp_path)])
        == 0
    )
    skipped = capsys.readouterr().err
    assert "mobile_former_26m in onnxruntime, bfloat16: skipped" in skipped
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["runtime"] for line in lines] == ["mfkernels"] * _C.bf16_supported() + ["eager"]
    assert ("needs a processor with avx512bf16" in skipped) == (not _C.bf16_supported())
    assert all(line["dtype"] == "bfloat16" and 0 <= line["difference"] < 0.3 for line in lines)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mobile_former_26m", "features.8 tokens"),
        ("dmf_96", "blocks.3 tokens"),
        ("iformer_t", "stages.2.7"),
    ],
)
def test_bench_profile(name, part, tmp_path, capsys):
    assert cli.main(["bench", "--profile", "--networks", name, "--output", str(tmp_path)]) == 0
    assert part in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "profile.jsonl").read_text().splitlines()]
    assert all(row["microseconds"] >= 0 and row["peak"] > 1e9 for row in rows)
    manifest = json.loads(lzma.decompress((DATA / "manifests.json.xz").read_bytes()))[name]
    assert 0.9 < sum(row["operations"] for row in rows) / 2 / manifest["macs"] <= 1  # the rest is attention


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "resnet50"], "network must be one of mobile_former_26m"),
        (["--runtimes", "tensorrt"], "runtime must be one of mfkernels, eager"),
        (["--dtype", "float16"], "dtype must be one of float32, bfloat16, int8"),
    ],
)
def test_bench_with_a_wrong_name_says_so_in_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--output", str(tmp_path), *arguments])
    assert stop.value.code != 0
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_rivals_are_those_of_the_papers():
    from mfkernels.bench.run import rivals

    parameters = {name: sum(p.numel() for p in make().parameters()) for name, make in rivals().items()}
    assert {name: round(count / 1e6, 2) for name, count in parameters.items()} == {
        "mobilenet_v3_large": 5.48,
        "shufflenet_v2_2x": 7.39,
    }
