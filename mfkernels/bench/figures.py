"""The figures of README.md and pages of docs: what is measured for them, and how the tables are written."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from .run import Entry, Favourites, bench, machine
from .runtimes import RUNTIMES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

_NETWORKS = (
    *(f"mobile_former_{size}m" for size in (26, 52, 96, 151, 214, 294, 508)),
    *("dmf_xxs", "dmf_xs", "dmf_s", "iformer_t", "iformer_s", "iformer_m"),
)
_FIRST = ("mobile_former_214m", "dmf_s", "iformer_m")  # all forms of these are tried
_RIVALS = ("mobilenet_v3_large", "shufflenet_v2_2x")
_SIZES = (224, 384, 640, 1024, 1536)
_TITLES = {
    "mfkernels": "mfkernels",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "litert": "LiteRT",
    "ncnn": "ncnn",
    "compile": "torch.compile",
    "eager": "PyTorch",
}


def measure() -> None:
    """Measure all that the tables need, into the folders of `benchmarks/results`.

    A processor without AVX-512 has folders of its own, and a table of its own for the networks.

    Raises:
        ValueError: this is no source tree.
    """
    _source_tree()
    favourites: Favourites = {}

    def run(table: str, networks: Iterable[Sequence[str]], *what: Any, **how: Any) -> None:
        own = "-avx2" if machine()["instruction_set"] == "avx2" else ""
        log = RESULTS / f"{table}{own}" / "results.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        for group in networks:
            bench(group, *what, log=log, favourites=favourites, **how)

    each = [[name] for name in sorted(_NETWORKS, key=lambda name: name not in _FIRST)]
    run("networks", each, list(RUNTIMES), [224], seconds=2)
    fast = [name for name in RUNTIMES if name != "eager"]
    run("sizes", [[_FIRST[0], *_RIVALS]], fast, _SIZES, seconds=1.5)
    dtypes = (torch.float32, torch.bfloat16, torch.int8)
    nets = [[name] for name in (*_FIRST, _RIVALS[0])]
    run("precision", nets, ["mfkernels", "openvino"], [224], dtypes=dtypes, seconds=2)


def write() -> None:
    """Write the tables into README.md and docs/speed.md, each between its two comments.

    Raises:
        ValueError: this is no source tree, or a page has no place for a table.
    """
    _source_tree()
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_tables(page, path.read_text()))


def with_tables(page: str, text: str) -> str:
    """Return the text of one of `PAGES` with its tables of `benchmarks/results`.

    Raises:
        ValueError: it has no place for a table, or the results of a table are of two machines.
    """
    for name, (folder, table) in PAGES[page].items():
        log = RESULTS / folder / "results.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        begin, end = f"<!-- bench:{name} -->", "<!-- /bench -->"
        found = re.search(f"{begin}.*?{end}", text, re.DOTALL)
        if not found:
            raise ValueError(f"bench: {page} has no {begin} with {end} after it")
        content = "\n\n".join([begin, table(lines) if lines else "Not measured yet.", end])
        text = text[: found.start()] + content + text[found.end() :]
    return text


def _source_tree() -> None:
    if not (ROOT / "benchmarks" / "rivals.py").is_file():
        raise ValueError(f"bench: the figures need a source tree, but {ROOT} is none")


def _networks(lines: list[dict[str, Any]]) -> str:
    entries = sorted(_entries(lines), key=lambda entry: _NETWORKS.index(entry.network))
    runtimes = [name for name in _TITLES if any(entry.runtime == name for entry in entries)]
    columns = [*(_TITLES[name] for name in runtimes), "best other / ours"]
    all_cold = all(entry.cold_ms is not None for entry in entries)
    rows = [["network", *columns, *(["cold: mfkernels", "cold: best other", "ratio"] if all_cold else [])]]
    for network in dict.fromkeys(entry.network for entry in entries):
        own = [entry for entry in entries if entry.network == network]
        times = {entry.runtime: entry.median_ms for entry in own}
        rows.append([network, *(_number(times.get(name)) for name in runtimes), _ratio(times)])
        if all_cold:
            cold = {entry.runtime: entry.cold_ms or 0.0 for entry in own}
            rows[-1] += [_number(cold.get("mfkernels")), _best_other(cold), _ratio(cold)]
    title = _where(lines) + ", float32, batch 1, 224x224:"
    return "\n\n".join([title, _table(rows), _losses(entries), _forms(entries)])


def _summary(lines: list[dict[str, Any]]) -> str:
    """Ours beside the best of the others, without the forms."""
    entries = sorted(_entries(lines), key=lambda entry: _NETWORKS.index(entry.network))
    rows = [["network", "mfkernels", "best other runtime", "best other / ours"]]
    for network in dict.fromkeys(entry.network for entry in entries):
        times = {entry.runtime: entry.median_ms for entry in entries if entry.network == network}
        rows.append([network, _number(times.get("mfkernels")), _best_other(times), _ratio(times)])
    return "\n\n".join([_where(lines) + ", float32, batch 1, 224x224:", _table(rows)])


def _losses(entries: list[Entry]) -> str:
    """Tell where another runtime is faster."""
    words = []
    for network in dict.fromkeys(entry.network for entry in entries):
        own = [entry for entry in entries if entry.network == network]
        ours = min((entry.median_ms for entry in own if entry.runtime == "mfkernels"), default=0.0)
        best = min(own, key=lambda entry: entry.median_ms)
        if best.runtime != "mfkernels":
            words.append(f"{network} ({_TITLES[best.runtime]}, by {100 * (ours / best.median_ms - 1):.0f} %)")
    return f"Another runtime is faster on {', '.join(words) if words else 'none of them'}."


def _sizes(lines: list[dict[str, Any]]) -> str:
    entries = _entries(lines)
    sizes = sorted({entry.size for entry in entries})
    rows = [["image side", *map(str, sizes)], *_over_sizes(entries, sizes, "")]
    if all(entry.cold_ms is not None for entry in entries):
        cold = [replace(entry, median_ms=entry.cold_ms or 0.0) for entry in entries]
        rows += _over_sizes(cold, sizes, "cold: ")
    return "\n\n".join([_where(lines) + ", float32, batch 1:", _table(rows), _forms(entries)])


def _over_sizes(entries: list[Entry], sizes: list[int], before: str) -> list[list[str]]:
    """Return rows of times and of ratios, with a word before each."""
    rows = []
    others = (e for e in entries if e.network not in _RIVALS)
    mine = {e.size: e.median_ms for e in others if e.runtime == "mfkernels"}
    for network in dict.fromkeys(entry.network for entry in entries):
        own = [entry for entry in entries if entry.network == network]
        of_size = [{e.runtime: e.median_ms for e in own if e.size == size} for size in sizes]
        ours = "mfkernels" in of_size[0]
        if ours:
            rows.append([f"{network}, deployed", *(_number(times["mfkernels"]) for times in of_size)])
        best = [_best_other(times) for times in of_size]
        rows.append([f"{network}, best {'other ' if ours else ''}runtime", *best])
        if network == _RIVALS[0] and mine:
            times = [{**of, "mfkernels": mine[size]} for of, size in zip(of_size, sizes, strict=True)]
            rows.append([f"{network} / ours", *map(_ratio, times)])
    return [[before + row[0], *row[1:]] for row in rows]


def _precision(lines: list[dict[str, Any]]) -> str:
    entries = _entries(lines)
    columns = list(dict.fromkeys((entry.runtime, entry.dtype) for entry in entries))
    rows = [["network", *(f"{_TITLES[runtime]}, {dtype}" for runtime, dtype in columns)]]
    for network in dict.fromkeys(entry.network for entry in entries):
        own = {(entry.runtime, entry.dtype): entry for entry in entries if entry.network == network}
        found = [own.get(column) for column in columns]
        cells = [f"{_number(e.median_ms)} ({100 * e.difference:.2g} %)" if e else "-" for e in found]
        rows.append([network, *cells])
    text = ", batch 1, 224x224; in brackets the largest difference from eager float32, of the largest output:"
    return "\n\n".join([_where(lines) + text, _table(rows), _forms(entries)])


def _detectors(lines: list[dict[str, Any]]) -> str:
    """Return a table of what `benchmarks/detectors.py` has measured."""
    entries = _entries(lines)
    columns = [
        ("mfkernels", dtype) for dtype in dict.fromkeys(e.dtype for e in entries if e.runtime == "mfkernels")
    ]
    columns += [(name, "float32") for name in list(_TITLES)[1:] if any(e.runtime == name for e in entries)]
    titles = [_TITLES[name] + (f", {dtype}" if name == "mfkernels" else "") for name, dtype in columns]
    rows = [["network", *titles, "best other / ours"]]
    for network in dict.fromkeys(entry.network for entry in entries):
        own = {(e.runtime, e.dtype): e.median_ms for e in entries if e.network == network}
        times = {name: time for (name, dtype), time in own.items() if dtype == "float32"}
        rows.append([network, *(_number(own.get(column)) for column in columns), _ratio(times)])
    text = ", batch 1, 800x1333; the others in float32:"
    return "\n\n".join([_where(lines) + text, _table(rows), _forms(entries)])


def _entries(lines: list[dict[str, Any]]) -> list[Entry]:
    names = [field.name for field in fields(Entry)]
    return [Entry(**{name: line[name] for name in names if name in line}) for line in lines]


def _where(lines: list[dict[str, Any]]) -> str:
    """Return the processor, the day and PyTorch's version.

    Raises:
        ValueError: the results of a table are of more than one.
    """
    for key in ("cpu", "instruction_set", "torch", "threads", "batch"):
        values = {line[key] for line in lines}
        if len(values) != 1:
            raise ValueError(f"bench: the results of a table must have one {key}, got {sorted(values)}")
    first, days = lines[0], sorted({line["date"] for line in lines})
    torch_version = first["torch"].split("+")[0]
    return (
        f"One core of {first['cpu']} ({first['instruction_set']}), {' to '.join(days)}, "
        f"PyTorch {torch_version}, milliseconds (medians)"
    )


def _forms(entries: list[Entry]) -> str:
    """Which form each runtime ran each network in."""
    parts = []
    for runtime in (name for name in _TITLES if name != "mfkernels"):
        own = [entry for entry in entries if entry.runtime == runtime]
        forms = []
        for form in dict.fromkeys(entry.form for entry in own):
            networks = dict.fromkeys(entry.network for entry in own if entry.form == form)
            forms.append(f"*{form}*: {', '.join(networks)}")
        if forms:
            versions = {entry.version for entry in own} - {""}
            parts.append(f"{' '.join([_TITLES[runtime], *versions])}: {'; '.join(forms)}.")
    return "Forms. " + "\n".join(parts)


def _best_other(times: dict[str, float]) -> str:
    """Return the time and the name of the fastest of the others."""
    others = {name: time for name, time in times.items() if name != "mfkernels"}
    best = min(others, key=lambda name: others[name], default=None)
    return "-" if best is None else f"{_number(others[best])} {_TITLES[best]}"


def _ratio(times: dict[str, float]) -> str:
    others = [time for runtime, time in times.items() if runtime != "mfkernels"]
    return f"{min(others) / times['mfkernels']:.2f}" if others and "mfkernels" in times else "-"


def _number(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


# Of each page its tables: the folder of the results, and what makes the table of them.
PAGES: dict[str, dict[str, tuple[str, Callable[[list[dict[str, Any]]], str]]]] = {
    "README.md": {"summary": ("networks", _summary)},
    "docs/speed.md": {
        "networks": ("networks", _networks),
        "sizes": ("sizes", _sizes),
        "precision": ("precision", _precision),
        "networks-avx2": ("networks-avx2", _networks),
    },
    "docs/detection.md": {"detectors": ("detectors", _detectors)},
}
