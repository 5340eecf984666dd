"""Writes the tables of the README and of the pages in docs/ anew, or of those that are named; ``--check`` only looks.

A marker says where a table comes from: ``<!-- ssmzoo ... -->`` from what that command prints,
``<!-- bench FILE.csv NAME ... -->`` from measurements in docs/benchmarks/, of those names alone, and
``<!-- op NAME -->`` from the declaration of that op.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ssmkernels import OPS
from ssmkernels.core import describe
from ssmzoo.bench.units import ratio, seconds
from ssmzoo.commands._output import markdown_table, size

DOCS = Path(__file__).parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
TABLE = re.compile(r"(<!-- (ssmzoo|bench|op) (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, str]


def fresh(match: re.Match[str]) -> str:
    """A table between its markers, as its source gives it now."""
    words = match[3].split()
    if match[2] == "ssmzoo":
        command = [sys.executable, "-m", "ssmzoo", *words]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    elif match[2] == "op":
        declared = OPS[words[0]].declared
        rows = [*describe.arguments(declared), *describe.results(declared)]
        text = markdown_table(["argument", "shape or type", "dtype", "default"], [list(row) for row in rows], []) + "\n"
    else:
        text = measured(DOCS / "benchmarks" / words[0], words[1:])
    return match[1] + text + match[4]


def measured(path: Path, names: list[str]) -> str:
    """The measurements of these names in a file that ``ssmzoo bench`` wrote, and below them the machine."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["what"] in names and not row["not_timed"]]
    if rows and rows[0]["kind"] == "scaling":
        told = markdown_table(["what", "measured"], list(scaling(rows)), ["measured"])
    else:
        columns = ["what", "implementation", "median", "times the limit", "times ours"]
        told = markdown_table(columns, list(contests(rows)), columns[2:])
    return f"{told}\n\n{machine(rows[0])}\n" if rows else ""


def contests(rows: list[Row]) -> Iterator[list[str]]:
    """Everyone's time at the one size that all were timed at."""
    for row in rows:
        if row["median_s"] and row["length"] in ("", "0"):
            ratios = (ratio(float(row[key])) if row[key] else "" for key in ("ratio_to_limit", "ratio_to_ours"))
            what = f"{row['what']}, {row['pass']} ({row['shape']})"
            yield [what, row["implementation"], seconds(float(row["median_s"])), *ratios]


def scaling(rows: list[Row]) -> Iterator[list[str]]:
    """How time for each token grows, what threads bring, and memory."""
    for row in rows:
        what = f"{row['what']}, {row['pass']}"
        if row["per_token_ratio"]:
            first, last = (f"{int(length):,}" for length in row["shape"].removeprefix("length ").split(" to "))
            yield [f"{what}: time for each token at {last} over that at {first}", ratio(float(row["per_token_ratio"]))]
        elif row["resident_bytes"]:
            yield [f"{what}: memory above inputs and results ({row['shape']})", size(int(row["resident_bytes"]))]
        elif row["implementation"].endswith(", 1 thread"):
            threads = next(
                other["implementation"].rpartition(", ")[2]
                for other in rows
                if other["implementation"].endswith("threads") and other["pass"] == row["pass"]
            )
            yield [f"{what}: one thread over {threads}, the same bits ({row['shape']})", ratio(speed_up(row, rows))]


def speed_up(one: Row, rows: list[Row]) -> float:
    """The time on one thread over that of the same on more."""
    same = [row for row in rows if (row["what"], row["pass"], row["shape"]) == (one["what"], one["pass"], one["shape"])]
    (many,) = (row for row in same if row["implementation"].endswith("threads"))
    return float(one["median_s"]) / float(many["median_s"])


def machine(row: Row) -> str:
    threads = "1 thread" if row["threads"] == "1" else f"{row['threads']} threads"
    threads += ", freed memory kept" if row.get("memory") else ""
    return (
        f"{row['cpu']}, {threads}, {row['dtype']}; ssmzoo {row['ssmzoo']} ({row['commit'] or 'no commit'}), "
        f"PyTorch {row['torch']}{', ' * bool(row['peers'])}{row['peers']}; {row['date'][:10]}. Medians."
    )


def main() -> None:
    tables = 0
    named = [Path(word).resolve() for word in sys.argv[1:] if word != "--check"]
    for page in named or PAGES:
        text = page.read_text()
        new, count = TABLE.subn(fresh, text)
        tables += count
        if "--check" not in sys.argv:
            page.write_text(new)
        elif new != text:
            sys.exit(f"the tables in {page.name} are out of date: make readme")
    print(f"{tables} tables")


if __name__ == "__main__":
    main()
