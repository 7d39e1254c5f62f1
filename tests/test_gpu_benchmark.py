"""`benchmarks/gpu.sh` runs, on a CPU at a glance: what it measures on a GPU no test could know."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mfkernels
from mfkernels.models import IFormer, MobileFormer

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
MEASURED = ("latency", "large", "streams", "training", "operators", "former", "bottleneck", "attention")


ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = ENVIRONMENT | {"PYTHON": sys.executable} | variables
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def test_all_parts(tmp_path):
    command = [sys.executable, SCRIPT.with_suffix(".py"), tmp_path, "--device", "cpu", "--quick"]
    environment = ENVIRONMENT | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == set(MEASURED)
    for row in rows:
        assert row["ours"] > 0 and row["best"] in row["others"].values()
        better = row["ours"] / row["best"] if row["unit"] == "images/s" else row["best"] / row["ours"]
        assert row["ratio"] == pytest.approx(better)
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {row['what']} |" in table for row in rows)
    assert (tmp_path / "ratios.png").stat().st_size > 1000
    assert done.stdout.count(": right, differs by") == 4
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_failures_are_told(tmp_path):
    done = run(str(tmp_path), "former", "nonsense", DEVICE="cpu")
    assert done.returncode == 1 and "== nonsense: exit status 2" in done.stdout
    assert '"part": "former"' in (tmp_path / "former.log").read_text()
    assert "got 'nonsense'" in (tmp_path / "nonsense.log").read_text()
    assert run().returncode == 2


def benchmark():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke_tells_what_is_wrong(tmp_path, monkeypatch, capsys):
    module, deploy = benchmark(), mfkernels.deploy

    def deployed_wrongly(model):
        if isinstance(model, IFormer):
            raise RuntimeError("no such kernel")
        network, factor = deploy(model), 1.01 if isinstance(model, MobileFormer) else torch.nan
        return lambda x: network(x) * factor

    monkeypatch.setattr(mfkernels, "deploy", deployed_wrongly)
    with pytest.raises(SystemExit, match="smoke: 3 of 4 failed"):
        module.smoke(module.Bench(tmp_path, "cpu", True, ""))
    said = capsys.readouterr().out
    assert "mobile_former_26m, deployed: WRONG, differs by 1.0e-02 of" in said
    assert "dmf_96, deployed: WRONG, differs by nan" in said
    assert "iformer_t, deployed: FAILED, RuntimeError: no such kernel" in said
    assert "dynamic_relu, forward and backward: right" in said


# Prints for each launch whether its kernel was in Triton's cache.
LAUNCH = """
import os

import torch
import triton
import triton_compile
from cases import dynamic_relu

import mfkernels

triton_compile.load_kernels()
triton_compile.driver.set_active(triton_compile.Driver(triton_compile.EACH))
triton.knobs.compilation.listener = lambda *, cache_hit, **_: print("in cache" if cache_hit else "compiled")
run = triton_compile.JITFunction.run
triton_compile.JITFunction.run = lambda *args, **others: run(*args, **others | {"warmup": True})
os.environ["TRITON_INTERPRET"] = "1"  # only so that CPU tensors are let through
with mfkernels.use_backend("triton"):
    for dtype in (torch.float32, torch.bfloat16):
        triton_compile.launch_shapes(dynamic_relu, dtype, dynamic_relu.CHOSEN[:1])
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_launches_find_what_was_compiled(tmp_path):
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = run(str(tmp_path), "compile", DEVICE="cpu", **cache)
    assert done.returncode == 0 and "compiled 3 variants" in done.stdout, done.stdout
    environment = ENVIRONMENT | cache | {"PYTHONPATH": f"{SCRIPT.parent.parent}:{Path(__file__).parent}"}
    said = subprocess.run([sys.executable, "-c", LAUNCH], env=environment, capture_output=True, text=True)
    # In float32, and in bfloat16.
    assert said.stdout.splitlines() == ["in cache"] * 3 + ["compiled"] * 3, said.stdout + said.stderr
