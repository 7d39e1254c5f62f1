"""Tables and plots of what was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .run import Entry


def table(entries: Sequence[Entry]) -> str:
    """Return a line for each network and size, with a column for each runtime.

    Columns are median milliseconds, and how our time compares with the best of the others. The form in which
    each runtime ran comes last.
    """
    dtypes = {entry.dtype for entry in entries}

    def column(entry: Entry) -> str:
        return entry.runtime if len(dtypes) == 1 else f"{entry.runtime} {entry.dtype}"

    columns = list(dict.fromkeys(map(column, entries)))
    lines = [["network", "size", *columns, "ours / best other"]]
    for size in dict.fromkeys(entry.size for entry in entries):
        for name in dict.fromkeys(entry.network for entry in entries):
            own = [entry for entry in entries if (entry.network, entry.size) == (name, size)]
            if not own:
                continue
            times = {column(entry): entry.median_ms for entry in own}
            ours = [entry.median_ms for entry in own if entry.runtime == "mfkernels"]
            others = [entry.median_ms for entry in own if entry.runtime != "mfkernels"]
            ratio = f"{min(ours) / min(others):.2f}" if ours and others else ""
            cells = [f"{times[name]:.2f}" if name in times else "-" for name in columns]
            lines.append([name, str(size), *cells, ratio])
    forms = [f"{entry.network}, {entry.size}, {column(entry)}: {entry.form}" for entry in entries]
    return "\n".join([_align(lines), *forms])


def profile_table(rows: Sequence[dict[str, Any]], peak: float | None) -> str:
    """`rows` as `mfkernels.bench.profile` returns them; `peak` in floating-point operations a second."""
    lines = [["part", "us", "MFLOP", "GFLOP/s", "of peak", "MB", "GB/s"]]
    total = {
        "part": "all",
        **{k: sum(row[k] for row in rows) for k in ("microseconds", "operations", "bytes")},
    }
    for row in [*rows, total]:
        seconds = max(row["microseconds"], 1e-3) * 1e-6
        share = f"{100 * row['operations'] / seconds / peak:.0f} %" if peak else "-"
        lines.append(
            [
                row["part"],
                f"{row['microseconds']:.0f}",
                f"{row['operations'] / 1e6:.1f}",
                f"{row['operations'] / seconds / 1e9:.1f}",
                share,
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['bytes'] / seconds / 1e9:.1f}",
            ]
        )
    return _align(lines)


def _align(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def plot_sizes(entries: Sequence[Entry], path: Path) -> None:
    """Latency over image size, each network in its best runtime; ours in plain PyTorch beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(entry.network for entry in entries):
        own = [entry for entry in entries if entry.network == name]
        ours = any(entry.runtime == "mfkernels" for entry in own)
        curves = {f"{name}, best other runtime": [e for e in own if e.runtime != "mfkernels"]}
        if ours:
            curves[f"{name}, mfkernels"] = [e for e in own if e.runtime == "mfkernels"]
        for label, points in curves.items():
            if not points:
                continue
            sizes = sorted({entry.size for entry in points})
            best = [min(e.median_ms for e in points if e.size == size) for size in sizes]
            style = "-" if "mfkernels" in label else ("--" if ours else ":")
            axes.plot(sizes, best, style, marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({entry.size for entry in entries})
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
    axes.minorticks_off()
    axes.set_xlabel("image side, pixels")
    axes.set_ylabel(f"latency, ms ({entries[0].threads} thread, batch {entries[0].batch})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def plot_family(entries: Sequence[Entry], path: Path) -> None:
    """Bars of every network in every runtime, at one size."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(entry.network for entry in entries))
    runtimes = list(dict.fromkeys(entry.runtime for entry in entries))
    figure = Figure(figsize=(1.5 + 1.2 * len(names), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(runtimes)
    for column, runtime in enumerate(runtimes):
        own = {e.network: e for e in entries if e.runtime == runtime}
        at = [i + column * width for i, name in enumerate(names) if name in own]
        axes.bar(at, [own[name].median_ms for name in names if name in own], width, label=runtime)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], names, rotation=30, ha="right")
    axes.set_ylabel(f"latency, ms ({entries[0].size}x{entries[0].size}, {entries[0].threads} thread)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def plot_parts(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Tell where the time of one network goes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([row["part"] for row in rows], [row["microseconds"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("microseconds")
    axes.set_title(title)
    figure.savefig(path, dpi=150)
