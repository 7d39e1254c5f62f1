"""`benchmarks/gpu.sh` runs, on a CPU at a glance: what it measures on a GPU no test could know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
MEASURED = ("latency", "large", "streams", "training", "operators", "former", "bottleneck", "attention")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def test_all_parts(tmp_path):
    command = [sys.executable, SCRIPT.with_suffix(".py"), tmp_path, "--device", "cpu", "--quick"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
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
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_failures_are_told(tmp_path):
    done = run(str(tmp_path), "former", "nonsense", DEVICE="cpu")
    assert done.returncode == 1 and "== nonsense: exit status 2" in done.stdout
    assert '"part": "former"' in (tmp_path / "former.log").read_text()
    assert "got 'nonsense'" in (tmp_path / "nonsense.log").read_text()
    assert run().returncode == 2
