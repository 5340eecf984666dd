"""``ssmzoo bench corpora`` from end to end at a small size, and how memory of several processes is told."""

from __future__ import annotations

import csv
import functools
import platform
import subprocess
import sys
import time

import pytest
import torch

from ssmkernels import bench
from ssmzoo.bench import corpora, watched
from ssmzoo.bench.corpus_text import documents, write_text

LIMITS = bench.Limits(bandwidth=1e10, flops=1e11)
SMALL = ("--set", "megabytes=1", "--set", "compared=1", "--set", "length=32", "--set", "learnt_from=20")
on_linux = pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux, whose /proc tells memory")


@pytest.fixture
def run(ssmzoo_command, monkeypatch):
    """Runs ``ssmzoo bench corpora`` → exit status, standard output, standard error."""
    monkeypatch.setattr("ssmkernels.bench.measure_limits", lambda *_, **__: LIMITS)
    return functools.partial(ssmzoo_command, "bench", "corpora")


@pytest.mark.slow
@on_linux
def test_corpora_from_end_to_end(run, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    monkeypatch.setattr(corpora, "TURNS", 1)
    status, out, err = run(*SMALL, "--set", "workers=2", "--out", str(tmp_path))
    assert (status, err) == (0, "")
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    made, ours, alone, loader, step = rows
    assert {row["kind"] for row in rows} == {"corpora"}
    assert [row["role"] for row in rows] == ["ours", "ours", "limit", "ours", "limit"]
    assert 50e6 < int(made["resident_bytes"]) < 2e9
    assert 0 < int(made["result_bytes"]) < 2e6
    assert "1 MB of text, 2 processes" in out
    assert float(ours["ratio_to_limit"]) == pytest.approx(float(ours["median_s"]) / float(alone["median_s"]))
    speed = float(alone["median_s"]) / float(ours["median_s"])
    assert float(ours["note"].split()[0]) == pytest.approx(speed, abs=0.01)
    assert float(loader["note"].split("%")[0]) / 100 == pytest.approx(float(loader["ratio_to_limit"]), abs=1e-4)
    assert float(loader["median_s"]) < float(step["median_s"])


@pytest.mark.parametrize("key", list(corpora.SIZES))
def test_sizes_are_at_least_one(run, tmp_path, key):
    status, _, err = run("--set", f"{key}=0", "--out", str(tmp_path))
    assert status == 1
    assert f"--set {key}: must be at least 1; got 0" in err
    assert run("--set", f"{key}=1.5", "--out", str(tmp_path))[0] == 1


def test_only_what_is_measured_here():
    plan = bench.Plan(torch.device("cpu"), torch.bfloat16, LIMITS)
    ((row,),) = corpora.bench_corpora("standard-library", plan)
    assert "measured on a CPU, with a model in float32" in row.refused


def test_no_two_documents_are_alike(tmp_path):
    drawn = documents(0)
    texts = [next(drawn) for _ in range(50)]
    assert len(set(texts)) == 50
    write_text(tmp_path / "x.jsonl", 100_000)
    assert 100_000 <= (tmp_path / "x.jsonl").stat().st_size < 150_000


# Takes memory, and has it until so much has been seen, or for five minutes.
HOLDS = """
import os, subprocess, sys, time
mebibytes, seen, *more = sys.argv[1:]
held, end = bytearray(b"x") * (int(mebibytes) * 2**20), time.monotonic() + 300
if more:
    subprocess.run([sys.executable, "-c", *more], check=True)
while not os.path.exists(seen) and time.monotonic() < end:
    time.sleep(0.01)
"""


@on_linux
def test_memory_of_a_command_is_that_of_all_its_processes(tmp_path, monkeypatch):
    memory_of, looks = watched.memory_of, []

    def look(processes):
        looks.append(memory_of(processes))
        for expected in (40, 100):
            if looks[-1] > expected * 2**20:
                (tmp_path / f"{expected}").touch()
        return looks[-1]

    monkeypatch.setattr(watched, "memory_of", look)
    one, two = ["40", str(tmp_path / "40")], ["60", str(tmp_path / "100")]
    seconds, alone = watched.watched([sys.executable, "-c", HOLDS, *one])
    assert alone == max(looks)
    assert seconds > watched.PAUSE
    _, both = watched.watched([sys.executable, "-c", HOLDS, *one, HOLDS, *two])
    assert 40 * 2**20 < alone < 70 * 2**20
    assert 100 * 2**20 < both < 140 * 2**20


@on_linux
def test_files_that_strangers_map_count():
    """A library is mapped by this process too: of a process's share alone, a part would be missing."""
    child = subprocess.Popen([sys.executable, "-c", "import torch, time; print(); time.sleep(60)"], stdout=-1)
    try:
        child.stdout.readline()
        time.sleep(0.1)
        with open(f"/proc/{child.pid}/status") as file:
            resident = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS:"))
        assert watched.memory_of([child.pid]) == pytest.approx(resident, rel=0.1)
    finally:
        child.kill()
        child.wait()


def test_a_command_that_fails_says_what_it_said():
    with pytest.raises(RuntimeError, match="ended with status 3: no such thing"):
        watched.watched([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"])
