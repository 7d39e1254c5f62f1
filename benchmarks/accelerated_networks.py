"""Training steps and inference of a network of yours before and after `mfkernels.accelerate`.

    python benchmarks/accelerated_networks.py MODULE:FUNCTION ... [--batch 8 32] [--dtype float32 bfloat16]
        [--threads 1] [--compile] [--job training] [--parts 10] [--rounds 5]

FUNCTION, without arguments, makes the network, which takes images of 224x224; MODULE is found as `import`
finds it. All forms take turns of three calls, the first of which is not timed. A step is the forward pass,
the backward pass and SGD on random images, in bfloat16 under autocast. The table shows images a second by
the medians, which are those of processor time where there is one thread, and their ratio; with --compile also
of both forms compiled by `torch.compile`. With --parts the operators follow that take most of the accelerated
network's time.
"""

import argparse
import copy
import importlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import mfkernels
from mfkernels.bench.run import pinned
from mfkernels.checks import tensors_in

Job = Callable[[nn.Module, Tensor, bool], None]


def step(model: nn.Module, images: Tensor, autocast: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model.train()(images)
    sum(out.float().square().mean() for out in tensors_in(outputs)).backward()
    optimizer.step()
    optimizer.zero_grad()


def infer(model: nn.Module, images: Tensor, autocast: bool) -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.eval()(images)


JOBS: dict[str, Job] = {"training": step, "inference": infer}


def speeds(forms: list[nn.Module], run: Job, images: Tensor, autocast: bool, rounds: int) -> list[float]:
    """Return the images a second of each form of a network."""
    # One thread's time on the processor does not have what other processes take of it in.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in forms]
    for _ in range(rounds):
        for form, taken in zip(forms, times, strict=True):
            run(form, images, autocast)  # its memory and its data into the caches
            for _ in range(2):
                start = clock()
                run(form, images, autocast)
                taken.append(clock() - start)
    return [len(images) / statistics.median(taken) for taken in times]


def show_parts(model: nn.Module, run: Job, images: Tensor, autocast: bool, count: int) -> None:
    """Print the operators that take most of the time, without what they call."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run(model, images, autocast)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    for event in events[:count]:
        print(f"    {100 * event.self_cpu_time_total / total:5.1f} % {event.count:6} calls  {event.key}")


def measure(place: str, options: argparse.Namespace) -> None:
    module, function = place.split(":")
    torch.manual_seed(0)
    plain = getattr(importlib.import_module(module), function)()
    fast = copy.deepcopy(plain)
    mfkernels.accelerate(fast)
    for job in options.job:
        for dtype in options.dtype:
            for batch in options.batch:
                forms = [plain, fast]
                if options.compile:
                    torch.compiler.reset()
                    forms += [torch.compile(form, dynamic=False) for form in forms]
                images, autocast = torch.randn(batch, 3, 224, 224), dtype == "bfloat16"
                taken = speeds(forms, JOBS[job], images, autocast, options.rounds)
                cells: list[str | int] = [place, job, dtype, batch]
                for before, after in zip(taken[::2], taken[1::2], strict=True):
                    cells += [f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                if options.parts:
                    show_parts(fast, JOBS[job], images, autocast, options.parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", metavar="MODULE:FUNCTION")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--job", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--parts", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, "")
    head = ["network", "", "dtype", "batch", "images/s before", "after", "ratio"]
    if options.compile:
        head += ["compiled, before", "compiled, after", "ratio"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    with pinned(options.threads):
        for place in options.networks:
            measure(place, options)


if __name__ == "__main__":
    main()
