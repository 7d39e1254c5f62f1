"""Narrow weights of deployed networks: milliseconds and errors beside float32, as the table of docs/int8.md.

taskset -c 1 python benchmarks/narrow_weights.py [NETWORK ...]
"""

import functools
import sys
from typing import Any

import torch
from torch.nn import functional as F

import mfkernels
from mfkernels.bench.run import Chosen, measure, randomise
from mfkernels.models import create_model

NETWORKS = ("mobile_former_26m", "mobile_former_214m", "mobile_former_508m", "dmf_s")
FORMS = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
SECONDS, IMAGES = 2.0, 256


def medians(networks: dict[str, Any], x: torch.Tensor) -> dict[str, tuple[float, float | None]]:
    """Return the milliseconds of each network: after calls of its own, and with cold caches."""
    chosen = {
        (name, "mfkernels", torch.float32): Chosen("deployed", functools.partial(network, x), 0.0)
        for name, network in networks.items()
    }
    return {one.network: (one.median_ms, one.cold_ms) for one in measure(chosen, x, 1, SECONDS)}


def images(seed: int) -> torch.Tensor:
    """Return 8 images of noise at several scales, each with a mean and a contrast of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(8, 3, 224, 224)
    for size in (4, 16, 56, 224):
        noise = torch.randn(8, 3, size, size, generator=generator)
        x += F.interpolate(noise, (224, 224), mode="bilinear")
    contrast, mean = torch.rand(2, 8, 3, 1, 1, generator=generator)
    return x * (0.2 + contrast) + 2 * mean - 1


def main() -> None:
    torch.set_num_threads(1)
    print("| network | weights | MB | ms | ms, cold | error / largest logit | same first class |")
    print("|---|---|---|---|---|---|---|")
    for network in sys.argv[1:] or NETWORKS:
        torch.manual_seed(0)
        model = create_model(network)
        randomise(model)
        made = {name: mfkernels.deploy(model.eval(), weights=weights) for name, weights in FORMS.items()}
        times = medians(made, torch.randn(1, 3, 224, 224))
        batches = [images(seed) for seed in range(IMAGES // 8)]
        logits = {name: torch.cat([one(x) for x in batches]) for name, one in made.items()}
        exact = logits["float32"]
        for name, one in made.items():
            hot, cold = times[name]
            error = (logits[name] - exact).abs().max() / exact.abs().max()
            same = (logits[name].argmax(1) == exact.argmax(1)).float().mean()
            errors = f"{error:.1e} | {same:.1%}" if name != "float32" else " | "
            size = one.weights.numel() * 4e-6
            print(f"| {network} | {name} | {size:.1f} | {hot:.2f} | {cold:.2f} | {errors} |", flush=True)


if __name__ == "__main__":
    main()
