"""How many variants of Triton's kernels the networks' layers ask for: a number that can only fall, since each
one takes a second or more to compile where a network first runs."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

# Of the smallest network of each family in bfloat16, forward and backward, in both memory formats.
COUNT = """
import json, torch, triton_compile
from cases import modules
triton_compile.load_kernels()
with triton_compile.noted(triton_compile.EACH) as found:
    for op in modules():
        for layout in (torch.contiguous_format, torch.channels_last):
            triton_compile.launch_layers(
                op, torch.bfloat16, ("mobile_former_26m", "dmf_xxs", "iformer_t"), layout)
print(json.dumps([json.loads(said)["name"] for _, said in found]))
"""
MOST = {
    "batch_norm": 123,
    "dynamic_conv2d": 82,
    "dynamic_relu": 18,
    "former_block": 4,
    "former_to_mobile_attention": 16,
    "global_response_norm": 38,
    "mobile_to_former_attention": 43,
    "modulation_attention": 12,
    "pointwise_conv_bn": 28,
    "token_hyper": 2,
}


def test_number_of_variants():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COUNT]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Counter(name.split(".")[2] for name in json.loads(done.stdout)) == MOST
