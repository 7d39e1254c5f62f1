"""What training would need on many GPUs, computed, and a run of many processes, measured here.

    python benchmarks/scaling.py [NETWORK ...]               # the tables of docs/scaling.md
    python benchmarks/scaling.py --processes 2 4 8 16        # by this number of processes with gloo

Computed means: PyTorch's counter counts the operations of the plain definitions at the recipe's sizes,
nothing is run, and the speeds below, which nobody measured here, turn bytes and operations into times. A
backward pass has twice the operations of a forward pass: those of the gradients of maps, and of weights. What
autograd keeps of an image is counted in a forward pass on this CPU.
"""

import argparse
import csv
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mfkernels
from mfkernels.models import create_model

NETWORKS = (
    *("mobile_former_26m", "mobile_former_294m", "mobile_former_508m"),
    *("dmf_xxs", "dmf_s", "iformer_t", "iformer_m", "iformer_h"),
)
GPUS = (8, 64, 512)
PEAK = 989e12  # operations a second in bfloat16, an H100's data sheet
SHARES = (0.01, 0.05, 0.2)  # of it that a network reaches; the first is for the tables with one
LAUNCH = 5e-6  # seconds from one operator to the next, the least that a step takes for each
IN_A_MACHINE = 8  # GPUs
NVLINK = 450e9  # bytes a second and direction, of a GPU
NETWORK = {"400 Gbit/s a GPU": 400e9, "100 Gbit/s a machine": 12.5e9}  # bytes a second, of a machine
HOP = 5e-6  # seconds, of a step of the ring beside its bytes
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends together
PHOTO = 110e3  # bytes, the mean of ImageNet's
HELD = 4 + 4 + 8  # bytes a parameter: weight, gradient and AdamW's two moments; an average has 4 more
BUCKETS = 4  # bytes a parameter, in which DDP sends gradients
READ = 150  # photos that a core of a CPU decodes and augments in a second


class Calls(TorchDispatchMode):
    """Counts operators that are not views."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Network:
    """A network and its recipe's batch. Operations and calls are of one image and of one step."""

    name: str
    batch: int
    parameters: int
    forward: int
    calls: int
    average: bool  # whether the recipe averages the weights
    kept: int  # bytes that autograd keeps of an image, in bfloat16 autocast

    @cached_property
    def bytes(self) -> int:
        """Of the gradients, in float32."""
        return 4 * self.parameters

    def moved(self, gpus: int) -> float:
        """Bytes that a GPU sends, and receives, in a ring all-reduce."""
        return 2 * (gpus - 1) / gpus * self.bytes

    def all_reduce(self, gpus: int, network: float) -> float:
        """Seconds. With as many rings as a machine has GPUs its link carries what one GPU sends."""
        if gpus == 1:
            return 0.0
        speed = NVLINK if gpus <= IN_A_MACHINE else min(NVLINK, network)
        buckets = -(-self.bytes // BUCKET)
        return self.moved(gpus) / speed + buckets * 2 * (gpus - 1) * HOP

    def freed(self, gpus: int) -> tuple[int, int]:
        """Bytes that a GPU holds beside activations with DDP, and that FSDP2 would free of it at most."""
        sharded = (HELD + 4 * self.average) * self.parameters
        held = sharded + BUCKETS * self.parameters
        return held, held - sharded // gpus

    def compute(self, gpus: int, share: float) -> tuple[float, float]:
        """Seconds of forward and backward pass."""
        images = self.batch / gpus
        both = max(3 * self.forward * images / (share * PEAK), self.calls * LAUNCH)
        return both / 3, 2 * both / 3

    def step(self, gpus: int, share: float, network: float) -> float:
        """Seconds: gradients travel beside the backward pass."""
        forward, backward = self.compute(gpus, share)
        return forward + max(backward, self.all_reduce(gpus, network))

    def limit(self, share: float, network: float) -> int:
        """Return the most GPUs, a power of two, that train at least half as many times as fast as one.

        Each GPU needs two images for its batch norms.
        """
        best = gpus = 1
        while 2 * gpus <= self.batch // 2:
            gpus *= 2
            if self.step(1, share, network) >= gpus / 2 * self.step(gpus, share, network):
                best = gpus
        return best


def count(name: str) -> Network:
    from mfkernels.train.recipe import load_recipe

    recipe = load_recipe(name)
    area = sum(size**2 for size in recipe.sizes) / len(recipe.sizes) / 224**2
    with torch.device("meta"), mfkernels.use_backend("reference"):
        model = create_model(name).train()
        images = torch.empty(2, 3, 224, 224)
        with Calls() as calls:
            with FlopCounterMode(display=False) as forward:
                loss = model(images).sum()
            loss.backward()
    operations = int(area * forward.get_total_flops() / len(images))
    parameters = sum(p.numel() for p in model.parameters())
    average = bool(recipe.ema_decay)
    return Network(name, recipe.batch_size, parameters, operations, calls.count, average, kept(name))


def kept(name: str) -> int:
    """Return the bytes that autograd keeps of an image for the backward pass, in bfloat16 autocast."""
    model, images = create_model(name).train(), torch.randn(2, 3, 224, 224)
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model(images)
    for tensor in (*model.parameters(), *model.buffers()):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in found.values()) // len(images)


def table(title: str, head: list[str], rows: Iterator[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def tables(networks: list[Network]) -> None:
    share, (fast, slow) = SHARES[0], NETWORK.values()
    speed = f"{100 * share:.0f} % of {PEAK / 1e12:.0f}e12 operations a second"
    table(
        "What a step moves (computed). A GPU sends, and receives, so many megabytes.",
        [
            *("network", "parameters, M", "gradients, MB", *(f"{n} GPUs, MB" for n in GPUS)),
            *("multiply-adds of an image, forward, G", "operators a step"),
        ],
        (
            [n.name, f"{n.parameters / 1e6:.2f}", f"{n.bytes / 1e6:.1f}"]
            + [f"{n.moved(gpus) / 1e6:.1f}" for gpus in GPUS]
            + [f"{n.forward / 2e9:.2f}", f"{n.calls}"]
            for n in networks
        ),
    )
    table(
        f"Milliseconds of the backward pass, and of all-reduce beside it (computed: {speed}, at least "
        f"{LAUNCH * 1e6:.0f} us an operator; {', '.join(NETWORK)} between machines).",
        ["network", "batch", *(f"backward, {n} GPUs" for n in GPUS)]
        + [f"all-reduce, {GPUS[0]} GPUs"]
        + [f"{n} GPUs, {link}" for n in GPUS[1:] for link in NETWORK],
        (
            [n.name, f"{n.batch}"]
            + [f"{1e3 * n.compute(gpus, share)[1]:.2f}" for gpus in GPUS]
            + [f"{1e3 * n.all_reduce(GPUS[0], fast):.2f}"]
            + [f"{1e3 * n.all_reduce(gpus, link):.2f}" for gpus in GPUS[1:] for link in (fast, slow)]
            for n in networks
        ),
    )
    table(
        "Where each recipe stops scaling: the most GPUs, a power of two, with which it trains at least half "
        "as many times as fast as with one (computed, by the share of the peak that is reached).",
        ["network", "two images a GPU"] + [f"{100 * s:.0f} %, {link}" for s in SHARES for link in NETWORK],
        (
            [n.name, f"{n.batch // 2}"] + [f"{n.limit(s, link)}" for s in SHARES for link in NETWORK.values()]
            for n in networks
        ),
    )

    def data(n: Network) -> Iterator[str]:
        for gpus in GPUS:
            speed = n.batch / n.step(gpus, share, fast)
            yield f"{speed / 1e3:.3g}"
            yield f"{speed * PHOTO / 1e9:.3g}"
            yield f"{speed / READ / gpus:.2g}"

    table(
        f"The data that they need (computed: {speed}; photos of {PHOTO / 1e3:.0f} kB, {READ} a second and "
        "core).",
        ["network"]
        + [f"{n} GPUs, {what}" for n in GPUS for what in ("1000 images/s", "GB/s", "cores a GPU")],
        ([n.name, *data(n)] for n in networks),
    )

    def memory(n: Network) -> Iterator[str]:
        held, freed = n.freed(GPUS[0])
        yield f"{held / 1e6:.0f}"
        yield f"{freed / 1e6:.0f}"
        yield f"{n.kept / 1e6:.0f}"
        yield f"{n.batch // GPUS[0]}"
        yield f"{freed / n.kept:.1f}"

    table(
        f"What each of {GPUS[0]} GPUs holds (computed; activations counted in bfloat16 autocast at 224x224, "
        "without checkpointing).",
        [
            *("network", "weights, gradients, moments, average, MB", "of it FSDP2 would free, MB"),
            *("activations of an image, MB", "images a GPU", "images more with FSDP2"),
        ],
        ([n.name, *memory(n)] for n in networks),
    )


SIDE, SHARE, STEPS = 32, 4, 8  # pixels, images a process and step, steps an epoch


def measure(processes: int) -> list[str]:
    """Train two epochs. Returns the numbers of the second one, and the memory of the largest process."""
    from mfkernels.train import digits

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        digits.write(root / "all", SIDE)
        for split, images in (("train", processes * SHARE * STEPS), ("validation", 60)):
            for path in sorted((root / "all" / split).rglob("*.png"), key=lambda path: path.name)[:images]:
                target = root / "data" / path.relative_to(root / "all")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        job = [__file__, "--worker", str(root / "data"), str(root / "run"), str(processes)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, *launcher, *job], env=environment, check=True)
        with open(root / "run" / "history.csv", newline="") as file:
            speed = float(list(csv.DictReader(file))[1]["images_per_second"])
        memory = [path.read_text().split() for path in (root / "run").glob("memory-*")]
    step = processes * SHARE / speed
    private, peak = (max(float(row[i]) for row in memory) for i in (0, 1))
    return [
        *(f"{processes}", f"{1e3 * step:.0f}", f"{1e3 * step / processes:.0f}", f"{speed:.1f}"),
        *(f"{private / 2**20:.0f}", f"{peak / 2**20:.0f}"),
    ]


def work(data: str, output: str, processes: str) -> None:
    """Be one process of such a training, and leave what memory it took.

    This is its own memory, and the peak with shared memory.
    """
    from mfkernels.train.__main__ import main as train

    torch.set_num_threads(1)
    settings = dict(epochs=2, batch_size=SHARE * int(processes), image_size=SIDE, workers=0, warmup_epochs=0)
    given = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", f"{value}")]
    command = ["classification", data, "--recipe", "mobile_former_26m", "--output", output, *given]
    if train([*command, "--num-classes", "10"]):
        sys.exit(1)
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    private = sum(1024 * int(words[1]) for words in lines if words[0].startswith("Private_"))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(output, f"memory-{os.environ['RANK']}").write_text(f"{private} {peak}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--processes", type=int, nargs="+")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
    elif options.processes:
        cores = len(os.sched_getaffinity(0))
        table(
            f"Training of mobile_former_26m, {SIDE}x{SIDE}, {SHARE} images a process and step (measured, on "
            f"{cores} core{'s' * (cores > 1)} that all processes share).",
            [
                *("processes", "a step, ms", "that by processes, ms", "images/s"),
                *("own memory a process, MiB", "peak with shared, MiB"),
            ],
            map(measure, options.processes),
        )
    else:
        tables([count(name) for name in options.networks])


if __name__ == "__main__":
    main()
