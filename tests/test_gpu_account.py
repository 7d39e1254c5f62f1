"""`benchmarks/gpu_account.py` counts the launches that `test_launches.py` counts in another way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_launches import NETWORKS

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parent.parent
COUNT = """
import gpu_account, json
gpu_account.triton_compile.load_kernels()
print(json.dumps([
    {name: [row.launches, row.bytes, row.programs, len(row.variants)] for name, row in rows.items()}
    for rows in gpu_account.accounts_of("mobile_former_26m", 1)
]))
"""


@pytest.mark.bed
def test_account():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    forms = json.loads(done.stdout)
    launches = tuple(sum(launches for launches, *_ in rows.values()) for rows in forms)
    assert launches == NETWORKS["mobile_former_26m"][0][1:]
    for name, (_, moved, programs, variants) in (row for rows in forms for row in rows.items()):
        assert moved > 0 and (programs > 0) == (variants > 0) == (": " in name)
