"""Updates the tables of the README and of the pages in docs/, or of named pages; ``--check`` only compares.

A marker says where a table comes from: ``<!-- ssmzoo ... -->`` from what that command prints,
``<!-- bench FILE.csv NAME ... -->`` and, in short, ``<!-- ratios FILE.csv NAME ... -->`` from measurements in
docs/benchmarks/, of those names only. ``ratios`` takes several files, each followed by its names.
``<!-- op NAME -->`` from the declaration of that op, and ``<!-- zoo FILE.csv -->`` from all mixers, their measurements
in that file, and the words in docs/zoo.yaml. ``<!-- plan FILE.csv -->`` compares plans with measurements.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

import ssmzoo
from ssmkernels import OPS
from ssmkernels.core import describe
from ssmzoo.bench.units import ratio, seconds
from ssmzoo.cli import app
from ssmzoo.commands._output import count, flops, markdown_table, size

DOCS = Path(__file__).parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
TABLE = re.compile(r"(<!-- (ssmzoo|bench|ratios|op|zoo|plan) (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

ZOO = ["mixer", "recurrence", "tracks", "paper", "parameters", "state", "FLOPs a token", "time over the limit"]
WIDTH, CONTEXT = 768, 2048  # of the layers in that table: d_model, and the tokens that they have seen

Row = dict[str, str]


def fresh(match: re.Match[str]) -> str:
    """A table between its markers, as its source gives it now."""
    words = match[3].split()
    if match[2] == "ssmzoo":
        with contextlib.redirect_stdout(io.StringIO()) as written:
            app(words, standalone_mode=False)
        text = written.getvalue()
    elif match[2] == "op":
        declared = OPS[words[0]].declared
        rows = [*describe.arguments(declared), *describe.results(declared)]
        text = markdown_table(["argument", "shape or type", "dtype", "default"], [list(row) for row in rows], []) + "\n"
    elif match[2] == "zoo":
        text = markdown_table(ZOO, list(zoo(read(DOCS / "benchmarks" / words[0]))), ZOO[4:]) + "\n"
    elif match[2] == "plan":
        text = markdown_table(["model", "mesh", "memory", "time"], list(plans(words[0])), ["memory", "time"]) + "\n"
    elif match[2] == "bench":
        text = measured(DOCS / "benchmarks" / words[0], words[1:])
    else:
        text = headlines(words)
    return match[1] + text + match[4]


def measured(path: Path, names: list[str]) -> str:
    """The measurements of these names in a file that ``ssmzoo bench`` wrote, and below them the machine."""
    rows = [row for row in read(path) if row["what"] in names]
    if rows and rows[0]["kind"] == "busy":
        columns = ["what", "implementation", "one thread", "several threads over one"]
        told = markdown_table(columns, list(busy(rows)), columns[2:])
    elif rows and rows[0]["kind"] == "context":
        columns = ["what", "processes", "median", "of the ideal rate", "memory of a process", ""]
        told = markdown_table(columns, list(contexts(rows)), columns[2:5])
    elif rows and rows[0]["kind"] == "corpora":
        told = markdown_table(["what", "of", "median", "memory", ""], list(corpora(rows)), ["median", "memory"])
    elif rows and rows[0]["kind"] == "scaling":
        told = markdown_table(["what", "measured"], list(scaling(rows)), ["measured"])
    else:
        columns = ["what", "implementation", "median", "times the limit", "times ours"]
        told = markdown_table(columns, list(contests(rows)), columns[2:])
    return f"{told}\n\n{machine(rows[0])}\n" if rows else ""


def zoo(rows: list[Row]) -> Iterator[list[str]]:
    """What each mixer computes, in words; its sizes with default options; and its time, where it was measured."""
    told = yaml.safe_load((DOCS / "zoo.yaml").read_text())
    ours = [row for row in rows if row["role"] == "ours" and row["pass"] == "forward + backward"]
    times = {
        row["what"]: float(row["ratio_to_limit"])
        for row in ours
        if row["ratio_to_limit"] and not int(row["length"] or 0)
    }
    for name, words in sorted(told.items()):
        with torch.device("meta"):
            mixer = ssmzoo.build_mixer(name, WIDTH)
            holds = mixer.causal and mixer.has_state
            state = size(mixer.initial_state(1, CONTEXT).nbytes) if holds else ""
        weights = sum(p.numel() for p in mixer.parameters())
        linear = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, torch.nn.Linear))
        work = 2 * linear + mixer.mixing_flops(CONTEXT)
        time = ratio(times[name]) if name in times else ""
        yield [name, words["recurrence"], words["tracks"], words["paper"], count(weights), state, flops(work), time]


def plans(name: str) -> Iterator[list[str]]:
    """What was planned over what was measured."""
    with (DOCS / "benchmarks" / name).open(newline="") as file:
        for row in csv.DictReader(file):
            yield [row["model"], row["mesh"], f"{float(row['memory ratio']):.2f}", f"{float(row['time ratio']):.2f}"]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if not row["not_timed"]]


def headlines(words: list[str]) -> str:
    """One line for each measurement: our time over the limit, and the time of every other package over ours."""
    lines, rows = [], []
    notes: dict[str, list[str]] = {}
    for word in words:
        if word.endswith(".csv"):
            rows = read(DOCS / "benchmarks" / word)
            continue
        timed = [row for row in rows if row["what"] == word and row["median_s"] and row["length"] in ("", "0")]
        for work in dict.fromkeys(row["pass"] for row in timed):
            (ours,) = (row for row in timed if row["pass"] == work and row["role"] == "ours")
            peers = [row for row in timed if row["pass"] == work and row["role"] == "peer"]
            others = ", ".join(f"{row['implementation']} {ratio(float(row['ratio_to_ours']))}" for row in peers)
            limit = ours["ratio_to_limit"]
            lines.append([f"{word}, {work}", ratio(float(limit)) if limit else "", others])
        notes.setdefault(f"{timed[0]['shape']}; {machine(timed[0])}", []).append(word)
    columns = ["what", "our time over the limit", "time of others over ours"]
    if not any(line[1] for line in lines):  # contests without a limit
        columns, lines = [columns[0], columns[2]], [[line[0], line[2]] for line in lines]
    below = "\n".join(f"- {', '.join(names)}: {note}" for note, names in notes.items())
    return f"{markdown_table(columns, lines, columns[1:2])}\n\n{below}\n"


def contests(rows: list[Row]) -> Iterator[list[str]]:
    """All times at the one size at which everything was timed."""
    for row in rows:
        if row["median_s"] and row["length"] in ("", "0"):
            ratios = (ratio(float(row[key])) if row[key] else "" for key in ("ratio_to_limit", "ratio_to_ours"))
            what = f"{row['what']}, {row['pass']} ({row['shape']})"
            yield [what, row["implementation"], seconds(float(row["median_s"])), *ratios]
        elif row["kind"] == "engine" and row["note"]:
            yield [f"{row['what']}, {row['pass']} ({row['shape']})", row["note"], "", "", ""]


def busy(rows: list[Row]) -> Iterator[list[str]]:
    """What several threads cost or bring on a busy machine."""
    for one, many in zip(rows[::2], rows[1::2], strict=True):
        what, name = f"{one['what']}, {one['pass']} ({one['shape']})", one["implementation"].removesuffix(", 1 thread")
        yield [what, name, seconds(float(one["median_s"])), ratio(float(many["ratio_to_limit"]))]


def contexts(rows: list[Row]) -> Iterator[list[str]]:
    """What several processes bring, and what memory a long context takes on each."""
    for row in rows:
        if row["median_s"]:
            rate = f"{1 / float(row['ratio_to_limit']):.2f}" if row["ratio_to_limit"] else ""
            memory = size(int(row["resident_bytes"])) if row["resident_bytes"] else ""
            what = f"{row['what']} ({row['shape']})"
            yield [what, row["implementation"], seconds(float(row["median_s"])), rate, memory, row["note"]]


def corpora(rows: list[Row]) -> Iterator[list[str]]:
    """What tokenising and loading take, and beside what."""
    for row in rows:
        memory = size(int(row["resident_bytes"])) if row["resident_bytes"] else ""
        what = f"{row['pass']} ({row['shape']})"
        yield [what, row["implementation"], seconds(float(row["median_s"])), memory, row["note"]]


def scaling(rows: list[Row]) -> Iterator[list[str]]:
    """How the time per token grows, what threads gain, and memory."""
    for row in rows:
        what = f"{row['what']}, {row['pass']}"
        if row["per_token_ratio"]:
            first, last = (f"{int(length):,}" for length in row["shape"].removeprefix("length ").split(" to "))
            yield [
                f"{what}: time per token at length {last} over that at {first}",
                ratio(float(row["per_token_ratio"])),
            ]
        elif row["resident_bytes"]:
            yield [f"{what}: memory above inputs and results ({row['shape']})", size(int(row["resident_bytes"]))]
        elif row["implementation"].endswith(", 1 thread"):
            threads = next(
                other["implementation"].rpartition(", ")[2]
                for other in rows
                if other["implementation"].endswith("threads") and other["pass"] == row["pass"]
            )
            yield [
                f"{what}: time on one thread over time on {threads}, same bits ({row['shape']})",
                ratio(speed_up(row, rows)),
            ]


def speed_up(one: Row, rows: list[Row]) -> float:
    """The time on one thread over that of the same on more."""
    same = [row for row in rows if (row["what"], row["pass"], row["shape"]) == (one["what"], one["pass"], one["shape"])]
    (many,) = (row for row in same if row["implementation"].endswith("threads"))
    return float(one["median_s"]) / float(many["median_s"])


def machine(row: Row) -> str:
    threads = "1 thread" if row["threads"] == "1" else f"{row['threads']} threads"
    threads += ", freed memory kept" if row.get("memory") else ""
    cpu = f"{row['cpu']} ({row['instructions']})" if row.get("instructions") else row["cpu"]
    return (
        f"{cpu}, {threads}, {row['dtype']}; ssmzoo {row['ssmzoo']} ({row['commit'] or 'no commit'}), "
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
