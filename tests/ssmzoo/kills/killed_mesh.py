"""Kills processes of a sharded run at random moments, which torchrun starts again; run by test_train_mesh_kills.py.

Usage: killed_mesh.py FOLDER KILLS SEED; the folder is :func:`prepared` and holds a run "whole" that was not killed.
Prints a line of JSON: how many kills there were, in which phases of the run, and what went wrong.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ssmzoo.checkpoints.checksums import check, checkpoints

STARTING, SAVING, BETWEEN, ENDING = PHASES = ("starting", "saving", "between", "ending")
ANY = "any"
AIMS = (ANY, SAVING, BETWEEN, STARTING)  # in turn, and the last of several at the end: a run is seldom there by chance
STARTS = 5.0  # seconds from the processes' start that a kill of this kind may come after, about what imports take
LONGEST = 60.0  # seconds that a phase is waited for
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
        return max((run / "log.csv").read_bytes().count(b"\n") - 1, 0)
    except FileNotFoundError:
        return 0


def phase(run: Path, before: int, last: int) -> str:
    """What a run is at: before it has got beyond so many steps, its last one, or something in between."""
    if any((run / "checkpoints").glob(".step-*.tmp")):
        return SAVING
    done = progress(run)
    return ENDING if done >= last else STARTING if done <= before else BETWEEN


def aims(kills: int) -> list[str]:
    """What the run is to be at when it is killed."""
    found = [AIMS[i % len(AIMS)] for i in range(kills)]
    return [*found[:-1], ENDING] if kills > 1 else found


def kill(folder: Path, name: str, kills: int, draw: random.Random) -> tuple[Counter[str], int]:
    """Runs, and kills one process again and again; the kills by what the run was at, and torchrun's status.

    Moments are random from before the first checkpoint on, and so are the processes.
    """
    job, run, last = begun(folder, name, kills), folder / name, steps(kills)
    made: Counter[str] = Counter()

    def wait(reached: Callable[[], bool], seconds: float = LONGEST, pause: float = 0.03) -> None:
        limit = time.monotonic() + seconds
        while job.poll() is None and not reached() and time.monotonic() < limit:
            time.sleep(pause)

    for aim in aims(kills):
        before = progress(run)
        wait(lambda: len(children(job.pid)) == PROCESSES)
        goal = {STARTING: 0, ENDING: last}.get(aim, before + draw.randint(1, 12))
        wait(lambda goal=goal: progress(run) >= min(goal, last))  # type: ignore[misc]
        if aim in (SAVING, BETWEEN):
            wait(lambda aim=aim, before=before: phase(run, before, last) in (aim, ENDING), pause=0.001)  # type: ignore[misc]
        time.sleep(draw.uniform(0, {STARTING: STARTS, SAVING: 0.02, BETWEEN: 0, ENDING: 0.5}.get(aim, 0.2)))
        victims = children(job.pid)
        if job.poll() is None and len(victims) == PROCESSES:
            found = phase(run, before, last)
            os.kill(draw.choice(victims), signal.SIGKILL)
            made[found] += 1
            wait(lambda victims=victims: not set(children(job.pid)) & set(victims))  # type: ignore[misc]
    return made, job.wait()


def outcome(run: Path) -> dict[str, object]:
    """All that a run leaves and that depends on its steps."""
    log = [line.split(",")[:7] for line in (run / "log.csv").read_text().splitlines()]  # without tokens a second
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    check(run)
    for step in checkpoints(run):
        check(step)
    return {"log": log, "files": files, "weights": (run / "model.safetensors").read_bytes()}


def main(folder: Path, kills: int, seed: int) -> None:
    """Prints what was killed, and what went wrong."""
    begin = time.monotonic()
    for attempt in range(ATTEMPTS):
        name = f"killed{attempt}"
        made, status = kill(folder, name, kills, random.Random(seed + attempt))
        if made.total() == kills:
            break
    said = (folder / f"{name}.txt").read_text()
    faults = [] if status == 0 else [f"torchrun ended with {status}: {said[-3000:]}"]
    if not faults:
        expected, found = outcome(folder / "whole"), outcome(folder / name)
        faults = [f"{what} differ: {found[what]!r:.1500}" for what in expected if found[what] != expected[what]]
    told = said.count("another process of the job is gone")
    phases = {each: made[each] for each in PHASES}
    result = {"seed": seed + attempt, "killed": made.total(), "phases": phases, "told": told, "steps": steps(kills)}
    print(json.dumps(result | {"seconds": round(time.monotonic() - begin), "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
