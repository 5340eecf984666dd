"""Kills processes of a sharded run at random moments, which torchrun starts again; run by test_train_mesh_kills.py.

Usage: killed_mesh.py FOLDER KILLS; the folder is :func:`prepared` and holds a run "whole" that was not killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from ssmzoo.checkpoints.checksums import check, checkpoints

PROCESSES = 2
ATTEMPTS = 5  # a run may end before it is killed, where other programs keep this one off its core meanwhile
MODEL = "d_model: 8\nn_layers: 2\npattern: [lstm]\nvocab_size: 256\n"
SETTINGS = {"batch_size": 2, "length": 12, "eval_every": 10, "eval_batches": 1, "save_every": 3, "cpu": "true"}
SETTINGS |= {"parallel.shard": PROCESSES, "warmup_steps": 0, "lr": 0.01}


def prepared(folder: Path) -> None:
    """Writes the model and its text."""
    (folder / "small.yaml").write_text(MODEL)
    (folder / "text.txt").write_text("the cat sat on the mat, and the dog sat on the log\n" * 40)


def steps(kills: int) -> int:
    """More than the kills take."""
    return 20 + 12 * kills


def training(name: str, kills: int) -> list[str]:
    """The arguments of ``ssmzoo`` for a run."""
    settings = {"steps": steps(kills), **SETTINGS}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["train", "small.yaml", "--data", "text.txt", "--out", name, *words]


def begun(folder: Path, name: str, kills: int) -> subprocess.Popen[str]:
    """The command as a user types it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES)]
    torchrun += ["--max-restarts", str(kills), "--monitor-interval", "0.1", "--standalone", "-m", "ssmzoo"]
    with (folder / f"{name}.txt").open("w") as output:
        command = [*torchrun, *training(name, kills)]
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, text=True)


def children(parent: int) -> list[int]:
    """The processes that torchrun has started, but for those that have ended."""
    found = []
    for word in _text(parent, f"task/{parent}/children").split():
        state = _text(int(word), "stat").rpartition(")")[2].split()[:1]
        if "ssmzoo" in _text(int(word), "cmdline").split("\0") and state != ["Z"]:
            found.append(int(word))
    return sorted(found)


def _text(process: int, name: str) -> str:
    """What the system tells of a process; nothing once it has gone."""
    try:
        return Path(f"/proc/{process}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def progress(run: Path) -> int:
    """Rows in the log."""
    try:
        return (run / "log.csv").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill(folder: Path, name: str, kills: int, draw: random.Random) -> tuple[int, int]:
    """Runs, and kills one process again and again, each time once the job has got on; the kills, and torchrun's status.

    Moments are random from before the first checkpoint on, and so are the processes.
    """
    job, run, made = begun(folder, name, kills), folder / name, 0
    while made < kills and job.poll() is None:
        before, limit = progress(run), draw.randint(0, 12)
        while job.poll() is None and (len(children(job.pid)) < PROCESSES or progress(run) < before + limit):
            time.sleep(0.03)
            if made and progress(run) >= steps(kills):
                break
        time.sleep(draw.uniform(0, 0.2))
        victims = children(job.pid)
        if job.poll() is None and len(victims) == PROCESSES:
            os.kill(draw.choice(victims), signal.SIGKILL)
            made += 1
            while job.poll() is None and children(job.pid) == victims:
                time.sleep(0.03)
            while job.poll() is None and set(children(job.pid)) & set(victims):
                time.sleep(0.03)
    return made, job.wait()


def outcome(run: Path) -> dict[str, object]:
    """All that a run leaves and that depends on its steps."""
    log = [line.split(",")[:7] for line in (run / "log.csv").read_text().splitlines()]  # without tokens a second
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    check(run)
    for step in checkpoints(run):
        check(step)
    return {"log": log, "files": files, "weights": (run / "model.safetensors").read_bytes()}


def main(folder: Path, kills: int) -> None:
    """Prints how many kills there were, what was said, and what went wrong."""
    draw = random.Random(0)
    for name in (f"killed{attempt}" for attempt in range(ATTEMPTS)):
        made, status = kill(folder, name, kills, draw)
        if made == kills:
            break
    said = (folder / f"{name}.txt").read_text()
    faults = [] if status == 0 else [f"torchrun ended with {status}: {said[-3000:]}"]
    if not faults:
        expected, found = outcome(folder / "whole"), outcome(folder / name)
        faults = [f"{what} differ: {found[what]!r:.1500}" for what in expected if found[what] != expected[what]]
    told = said.count("another process of the job is gone")
    print(json.dumps({"killed": made, "told": told, "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
