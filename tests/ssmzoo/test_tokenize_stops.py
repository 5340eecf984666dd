"""``ssmzoo tokenize`` that is stopped by Ctrl-C says what it keeps, and by which command the rest is done."""

from __future__ import annotations

import gzip
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from ssmzoo.train.corpora import read_manifest
from ssmzoo.train.corpora.processes import over_processes
from ssmzoo.train.corpora.tokenize import PLAN, kept


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Three files, each of which is a source and so becomes a shard of its own."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        (tmp_path / f"a {i}.jsonl").write_text('{"words": "hello"}\n' * (10 + i))
    return [f"{name}=a {i}.jsonl" for i, name in enumerate("xyz")]


def interrupted_after(monkeypatch, shards):
    """Has Ctrl-C come once so many shards are finished."""

    def stopping(work, tasks, workers):
        yield from over_processes(work, tasks[:shards], workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["ssmzoo.train.corpora.tokenize"], "over_processes", stopping)


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        (0, "stopped before a shard in new corpus was finished. "),
        (1, "stopped; 1 shard is kept in new corpus. "),
        (2, "stopped; 2 shards are kept in new corpus. "),
    ],
)
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(shards, said, sources, ssmzoo_command, monkeypatch, tmp_path):
    options = ["--key", "words", "--workers", "1", "--out"]
    assert ssmzoo_command("tokenize", *sources, *options, "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupted_after(patch, shards)
        status, out, err = ssmzoo_command("tokenize", *sources, *options, "new corpus")
    assert (status, err) == (130, "")
    told, again = out.strip().split("The same command does the rest: ")
    assert told == said
    assert kept(tmp_path / "new corpus") == shards
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "new corpus").glob("*.ids")}
    words = shlex.split(again)
    assert words[0] == "ssmzoo"
    assert ssmzoo_command(*words[1:])[0] == 0
    assert {path: path.stat().st_mtime_ns for path in begun} == begun
    assert read_manifest(tmp_path / "new corpus").checksum() == read_manifest(tmp_path / "whole").checksum()


def test_a_complete_corpus_that_is_being_checked(sources, ssmzoo_command, monkeypatch):
    options = ["--key", "words", "--workers", "1", "--out", "corpus"]
    assert ssmzoo_command("tokenize", *sources, *options)[0] == 0
    interrupted_after(monkeypatch, 0)
    assert "stopped; 3 shards are kept in corpus. " in ssmzoo_command("tokenize", *sources, *options)[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
@pytest.mark.parametrize("pause", [0.0, 0.5])
def test_ctrl_c_reaches_all_processes_and_none_complains(pause, sources, tmp_path):
    """A terminal sends it to the whole group, and to processes that are only starting, too."""
    # A small file of minutes of work, so that the job is still busy however late this process gets to send the signal
    (tmp_path / "long.jsonl.gz").write_bytes(gzip.compress(b'{"words": "hello, world"}\n' * 400_000) * 400)
    sources = [*sources, "long=long.jsonl.gz"]
    call = [sys.executable, "-m", "ssmzoo", "tokenize", *sources, "--key", "words", "--workers", "2", "--out", "corpus"]
    # What a shell starts in the background is deaf to it, and so is what that starts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        job = subprocess.Popen(call, stdout=-1, stderr=-1, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while not (tmp_path / "corpus" / PLAN).exists() and job.poll() is None:
        time.sleep(0.002)
    time.sleep(pause)
    os.killpg(job.pid, signal.SIGINT)
    out, err = job.communicate(timeout=300)
    assert (job.returncode, err) == (130, "")
    assert "The same command does the rest: ssmzoo tokenize" in out
