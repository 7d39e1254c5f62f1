"""The table of the times that `python benchmarks/operators.py FILE` left, and a paragraph on them.

    python benchmarks/operator_table.py FILE ... > TABLE

For every case microseconds of ours and of the fastest other way, their ratio, the floor and the share of it
that we reach; for every operator the geometric mean of the ratios and the smallest one. The paragraph of
docs/speed.md between the two comments `operators` is rewritten.
"""

import json
import re
import statistics
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
PARAGRAPH = re.compile(r"(<!-- operators -->\n).*?(\n<!-- /operators -->)", re.DOTALL)


def _line(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def table(rows: list[dict]) -> None:
    machines = sorted({f"{row['cpu']}, {row['instruction_set']}, PyTorch {row['torch']}" for row in rows})
    print(f"{'; '.join(machines)}; one core, {min(row['date'] for row in rows)}.\n")
    _line(
        "operator",
        "direction",
        "case",
        "ours, us",
        "best other, us",
        "it is",
        "ratio",
        "floor, us",
        "reached",
    )
    _line(*["---"] * 9)
    for row in rows:
        name = best(row)
        ours, other, floor = (
            f"{1e6 * t:.1f}" for t in (row["times"]["ours"], row["times"][name], row["floor"])
        )
        reached = f"{row['floor'] / row['times']['ours']:.0%}"
        ratio = f"{row['ratios'][name]:.2f}"
        _line(row["operator"], row["direction"], row["case"], ours, other, name, ratio, floor, reached)
    print()
    _line("operator", "batch", "direction", "cases", "geometric mean", "smallest")
    _line(*["---"] * 6)
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault((row["operator"], row["batch"], row["direction"]), []).append(ratio_of(row))
    for key, ratios in sorted(groups.items()):
        _line(*key, len(ratios), f"{statistics.geometric_mean(ratios):.2f}", f"{min(ratios):.2f}")


def best(row: dict) -> str:
    return min(row["ratios"], key=row["ratios"].__getitem__)


def ratio_of(row: dict) -> float:
    return row["ratios"][best(row)]


def paragraph(rows: list[dict]) -> str:
    ratios = [ratio_of(row) for row in rows]
    slower = [row for row in rows if ratio_of(row) < 0.95]
    words = f"{len(rows)} cases, geometric mean of the ratios {statistics.geometric_mean(ratios):.2f}"
    for batch in sorted({row["batch"] for row in rows}):
        some = [ratio_of(row) for row in rows if row["batch"] == batch]
        words += f", at batch {batch} {statistics.geometric_mean(some):.2f}"
    words += f"; {len(slower)} below 0.95"
    if slower:
        names = sorted({f"`{row['operator']}`" for row in slower})
        words += f" (of {', '.join(names)}; the smallest {min(ratios):.2f})"
    first = rows[0]
    return f"{first['cpu']} ({first['instruction_set']}), {min(row['date'] for row in rows)}:\n{words}."


def main(files: list[str]) -> None:
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    table(rows)
    text = PAGE.read_text()
    if not PARAGRAPH.search(text):
        raise SystemExit(f"{PAGE} has no paragraph between the comments `operators`")
    PAGE.write_text(PARAGRAPH.sub(lambda found: found[1] + paragraph(rows) + found[2], text))


if __name__ == "__main__":
    main(sys.argv[1:])
