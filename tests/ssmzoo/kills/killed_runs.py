"""Kills training at its changes of files, one after another, and goes on; run by test_train_kills.py.

Each run is a fork of one process, which has imported everything and has no threads. kill_at.c must be preloaded.

Usage: killed_runs.py FOLDER KILLS
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.checkpoints.checksums import checkpoints
from ssmzoo.train import finish as finish_module
from ssmzoo.train import resume, train

LSTM = ssmzoo.ModelConfig(d_model=8, n_layers=1, pattern=["lstm"], vocab_size=256)
QUICK = {"steps": 6, "batch_size": 2, "length": 12, "eval_every": 3, "eval_batches": 1, "save_every": 2, "keep": 2}
SHIM = ctypes.CDLL(None)
TEXT = "the cat sat on the mat, and the dog sat on the log\n" * 20


def go_on(run: Path, text: Path) -> None:
    """What a user does after a crash: the same command again, or ``--resume`` once there is a checkpoint."""
    if not checkpoints(run):
        train(LSTM, text, QUICK, run, quiet=True)
        return
    try:
        resume(run, quiet=True)
    except ValueError as error:
        if "is complete" not in str(error):
            raise


def forked(run: Path, text: Path, moment: int = 0) -> tuple[int, int]:
    """Trains or goes on in a process of its own, which dies at its call number ``moment``; at none if 0.

    Returns:
        Its exit status, negative for a signal, and the number of its calls if it lived.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 0
        SHIM.kill_at_start(os.fsencode(run), ctypes.c_long(moment))
        try:
            go_on(run, text)
        except BaseException:
            traceback.print_exc()
            status = 1
        os.write(writer, str(SHIM.kill_at_stop()).encode())
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        count = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(count or 0)


def outcome(run: Path) -> dict[str, object]:
    """All that a run leaves and that depends on its steps: losses, names of files, weights, the optimizer's state."""
    log = [line.split(",")[:7] for line in (run / "log.csv").read_text().splitlines()]  # without tokens a second
    found = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    names = ["model.safetensors", "curve.png", *(f"checkpoints/step-000000{i}/optimizer.safetensors" for i in (4, 6))]
    return {"log": log, "files": found, **{name: (run / name).read_bytes() for name in names}}


def differences(run: Path, expected: dict[str, object]) -> str:
    """What of a run is not as it should be, in words; nothing if all is."""
    found = outcome(run)
    wrong = [name for name in expected if found[name] != expected[name]]
    return f"{', '.join(wrong)} differ; its files are {found['files']}, its log {found['log']}" if wrong else ""


def loads_newest(run: Path) -> bool:
    """Between kill and resumption the run is the model of its newest checkpoint, if it has one."""
    steps = checkpoints(run)
    if not steps:
        return True
    ours, newest = (pretrained.load(folder).state_dict() for folder in (run, steps[-1]))
    return all(torch.equal(ours[name], newest[name]) for name in newest)


def kill_and_go_on(run: Path, text: Path, moments: list[int], expected: dict[str, object]) -> tuple[list[str], str]:
    """Returns what was killed ("train" or "resume") each time, and what went wrong in the end, if anything did."""
    killed = []
    for moment in moments:
        kind = "resume" if checkpoints(run) else "train"
        status, _ = forked(run, text, moment)
        if status != -signal.SIGKILL:
            return killed, f"ended by itself with {status}" if status else differences(run, expected)
        killed.append(kind)
        if not loads_newest(run):
            return killed, "its weights are not those of the newest checkpoint"
    status, _ = forked(run, text)
    if status != 0:
        return killed, f"could not go on: {status}"
    return killed, differences(run, expected)


def main(folder: Path, kills: int) -> None:
    """Prints the counts as JSON, with the moments and the fault of each run that went wrong."""
    torch.set_num_threads(1)
    finish_module.SAMPLE = 1
    text = folder / "text.txt"
    text.write_text(TEXT)
    train(LSTM, text, QUICK, folder / "warm", quiet=True)  # all that is imported late
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a process of {threads} threads cannot be forked"
    status, calls = forked(folder / "whole", text)
    assert status == 0, f"the unbroken run ended with {status}"
    assert calls > 0, "kill_at.c is not preloaded"
    expected, draw, faults = outcome(folder / "whole"), random.Random(0), []
    made = {"train": 0, "resume": 0}
    firsts = max(1, kills // 2)
    for i in range(kills):
        if sum(made.values()) >= kills:
            break
        run = folder / f"run{i}"
        # The first moments are spread over a whole run; the second ones, mostly of what goes on, are drawn.
        first = 1 + i * calls // firsts if i < firsts else draw.randint(1, calls)
        moments = [first, draw.randint(1, max(2, calls - first))][: kills - sum(made.values())]
        killed, fault = kill_and_go_on(run, text, moments, expected)
        for kind in killed:
            made[kind] += 1
        if fault:
            faults.append(f"killed at {moments}: {fault}")
        else:
            shutil.rmtree(run)
    print(json.dumps({"calls": calls, "killed": made, "faults": faults}))


main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
