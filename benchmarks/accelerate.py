"""Training steps and inference of a network of yours before and after `mfkernels.accelerate`, on one core.

    python benchmarks/accelerate.py [--batch 8] [--rounds 5] MODULE:FUNCTION ...

FUNCTION, without arguments, makes the network, which takes images of 224x224; MODULE is found as `import`
finds it. Both take turns of three calls, the first of which is not timed. A step is the forward pass, the
backward pass and SGD on random images; the table shows medians in milliseconds, and their ratio.
"""

import argparse
import copy
import importlib
import statistics
import sys
import time

import torch
from torch import Tensor, nn

import mfkernels
from mfkernels.bench.run import pinned
from mfkernels.checks import tensors_in


def step(model: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    sum(out.square().mean() for out in tensors_in(model.train()(images))).backward()
    optimizer.step()
    optimizer.zero_grad()


def infer(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model.eval()(images)


def measure(place: str, batch: int, rounds: int) -> None:
    module, function = place.split(":")
    torch.manual_seed(0)
    plain = getattr(importlib.import_module(module), function)()
    fast = copy.deepcopy(plain)
    mfkernels.accelerate(fast)
    images = torch.randn(batch, 3, 224, 224)
    for what, run in (("training", step), ("inference", infer)):
        times: dict[nn.Module, list[float]] = {plain: [], fast: []}
        for _ in range(rounds):
            for model, taken in times.items():
                run(model, images)  # its memory and its data into the caches
                for _ in range(2):
                    start = time.perf_counter()
                    run(model, images)
                    taken.append(1e3 * (time.perf_counter() - start))
        before, after = (statistics.median(taken) for taken in times.values())
        cells = (place, what, batch, f"{before:.1f}", f"{after:.1f}", f"{before / after:.2f}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", metavar="MODULE:FUNCTION")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, "")
    print("| network | | batch | before, ms | after, ms | ratio |\n|---|---|---|---|---|---|")
    with pinned(1):
        for place in options.networks:
            measure(place, options.batch, options.rounds)


if __name__ == "__main__":
    main()
