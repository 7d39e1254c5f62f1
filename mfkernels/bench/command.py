"""The command `mfkernels bench`."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import torch

from ..models import list_models
from . import figures, report
from .run import bench, machine, peak_flops, profile
from .runtimes import RUNTIMES

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def run(options: Namespace) -> None:
    """Measure, print a table, and leave results.jsonl (appended to) and plots in `options.output`.

    Raises:
        ValueError: an unknown name.
        OSError: the folder cannot be written.
    """
    if options.all:
        figures.measure()
    if options.all or options.report:
        figures.write()
        return
    networks, sizes = options.networks.split(","), [int(size) for size in options.sizes.split(",")]
    options.output.mkdir(parents=True, exist_ok=True)
    plots = importlib.util.find_spec("matplotlib") is not None
    if not plots:
        print("no plots: matplotlib is not installed")
    if options.profile:
        for name in networks:
            if name in list_models():
                for size in sizes:
                    _profile(name, size, options.output, plots)
        return
    for dtype in options.dtype.split(","):
        if dtype not in _DTYPES:
            raise ValueError(f"bench: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    entries = bench(
        networks,
        options.runtimes.split(",") if options.runtimes else list(RUNTIMES),
        sizes,
        batch=options.batch,
        threads=options.threads,
        dtypes=[_DTYPES[dtype] for dtype in options.dtype.split(",")],
        seconds=options.seconds,
        log=options.output / "results.jsonl",
    )
    print(
        ", ".join(machine().values())
        + f", {options.threads} thread(s), batch {options.batch}, {options.dtype}"
    )
    print(report.table(entries))
    if plots and len(sizes) > 1:
        report.plot_sizes(entries, options.output / "sizes.png")
    for size in sizes:
        own = [entry for entry in entries if entry.size == size]
        if plots and own and len(networks) > 1:
            report.plot_family(own, options.output / f"networks-{size}.png")


def _profile(name: str, size: int, output: Path, plots: bool) -> None:
    rows, peak = profile(name, size), peak_flops()
    print(f"{name} at {size}x{size}, one thread; float32 peak measured: {peak / 1e9:.0f} GFLOP/s")
    print(report.profile_table(rows, peak))
    with (output / "profile.jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps(machine() | {"network": name, "size": size, "peak": peak, **row}) + "\n")
    if plots:
        report.plot_parts(rows, f"{name}, {size}x{size}", output / f"parts-{name}-{size}.png")
