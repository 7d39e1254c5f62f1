"""The operators' times that `python -m pytest benchmarks --benchmark-json FILE` left:

    python benchmarks/operator_table.py FILE ...

For every shape microseconds of ours and of the fastest other way, their ratio, the floor and the share of it
that we reach; for every operator the geometric mean of the ratios and the smallest one.
"""

import json
import statistics
import sys
from pathlib import Path

WAYS = ("eager", "rewritten", "eager compiled", "rewritten compiled")


def _line(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def main(files: list[str]) -> None:
    benchmarks = [row for file in files for row in json.loads(Path(file).read_text())["benchmarks"]]
    rows = [row["extra_info"] for row in benchmarks]
    _line(
        "operator",
        "direction",
        "arguments",
        "ours, us",
        "best other, us",
        "it is",
        "ratio",
        "floor, us",
        "reached",
    )
    _line(*["---"] * 9)
    ratios: dict[tuple, list[float]] = {}
    for row in rows:
        others = {way: row[way] for way in WAYS if way in row}
        best = min(others, key=others.__getitem__)
        ratio = others[best] / row["ours"]
        for key in ((row["operator"], row["batch"], row["direction"]), ("all", "", "")):
            ratios.setdefault(key, []).append(ratio)
        ours, other, floor = (f"{1e6 * t:.1f}" for t in (row["ours"], others[best], row["floor"]))
        reached = f"{row['floor'] / row['ours']:.0%}"
        _line(
            row["operator"], row["direction"], row["layer"], ours, other, best, f"{ratio:.2f}", floor, reached
        )
    print()
    _line("operator", "batch", "direction", "shapes", "geometric mean", "smallest")
    _line(*["---"] * 6)
    for key, values in sorted(ratios.items(), key=str):
        _line(*key, len(values), f"{statistics.geometric_mean(values):.2f}", f"{min(values):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
