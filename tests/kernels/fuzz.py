"""Random calls of every op and implementation on the CPU, right and wrong ones, in processes that may crash.

    python tests/kernels/fuzz.py --calls 100000 --seed 1

Every call must give the reference's numbers, within the budget of `ssmkernels.testing.check`, or be refused by an error
that names the op and an argument. A call that ends its process, takes more than five minutes, raises something else or
gives other numbers is printed with its number: `--only NUMBER` makes it again.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmkernels import OPS
from ssmkernels.check.budget import BAND, Rounding, Truth, moved
from ssmkernels.check.spec import specs, tensors_of
from ssmkernels.check.wrapper import Wrapper, floating, unwrap
from ssmkernels.core.block_mask import BlockMask

SPECS = specs()
PATIENCE = 300  # seconds without a new call, after which a process hangs, even on a busy machine
KINDS = ("plain",) * 6 + ("strided", "expanded", "negated", "conjugated", "gradient", "inference", "fake", "meta")
KINDS += ("wrapped", "zero")
NO_VALUES = ("fake", "meta", "wrapped")
NUMBERS = (-1, 0, 1, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 2.5, float("nan"), float("inf"))
WRONG = ("text", [1], (1, 0), (2**31, 0), (2**63, 0), None, object(), True)


class Call:
    """The call of one number: everything about it follows from the seed and the number."""

    def __init__(self, seed, number):
        draw = self.draw = random.Random(f"{seed} {number}")
        self.op = draw.choice(sorted(SPECS))
        self.spec = SPECS[self.op]
        near = [row for row in self.spec.rows if row.get("layout") != "far"]
        self.row = {k: v for row in draw.sample(near, min(draw.randrange(4), len(near))) for k, v in row.items()}
        sizes = [key for key, value in self.spec.base.items() if type(value) is int]
        if sizes and draw.random() < 0.5:
            self.row[draw.choice(sizes)] = draw.randint(1, 9)
        self.dtype = draw.choice(self.spec.dtypes)
        self.kind = draw.choice(KINDS)
        self.implementation = draw.choice((None, *OPS[self.op].names))
        self.wrong = ""

    def __str__(self):
        given = f"{self.row} {self.dtype} implementation={self.implementation} {self.kind}"
        return f"{self.op} {given}" + (f", wrong: {self.wrong}" if self.wrong else "")

    def arguments(self):
        arguments = self.spec.inputs(self.spec.case(self.row), self.dtype, "cpu", self.draw.randrange(100))
        if self.draw.random() < 0.3:
            name = self.draw.choice(sorted(inspect.signature(self.spec.function()).parameters))
            if name != "implementation":
                arguments[name] = self.changed(arguments.get(name))
                self.wrong = f"{name}={arguments[name]!r:.60}"
        return arguments

    def changed(self, value):
        """Something that may well not fit in a value's place."""
        if type(value) is int:  # a length, say: no call that is valid and takes hours
            return self.draw.choice([n for n in NUMBERS if not 100 < n < 2**60] + [*WRONG])
        if not isinstance(value, torch.Tensor) or self.draw.random() < 0.2:
            return self.draw.choice(NUMBERS + WRONG)
        axis = self.draw.randrange(max(value.ndim, 1))
        larger = [n + (i == axis) for i, n in enumerate(value.shape)]
        dtypes = (torch.int64, torch.bool, torch.float64, torch.float16, torch.complex64, torch.int32)
        ways = (
            lambda: value.unsqueeze(axis),
            lambda: value.flatten(),
            lambda: value.new_zeros(larger),
            lambda: value.to(self.draw.choice(dtypes)),
            lambda: value - 100 if value.dtype in (torch.int32, torch.int64) else -value,
            lambda: value + 2**20 if value.dtype in (torch.int32, torch.int64) else value * 0,
            lambda: value.to("meta"),
            lambda: value.to_sparse() if value.ndim else value,
        )
        return self.draw.choice(ways)()

    def dressed(self, arguments):
        """The arguments in the memory of this call's kind."""
        made = {}
        target = self.draw.choice([n for n, a in arguments.items() if floating(a)] or [""])
        for name, a in arguments.items():
            if not isinstance(a, torch.Tensor) or a.layout != torch.strided:
                made[name] = a
                continue
            every = {"meta": lambda a: a.to("meta"), "wrapped": lambda a: Wrapper(a) if floating(a) else a}
            one = {
                "strided": lambda a: a.unsqueeze(-1).repeat_interleave(2, -1)[..., 0],
                "expanded": lambda a: a[..., :1].expand_as(a) if a.ndim and a.shape[-1] else a,
                "negated": lambda a: (
                    torch.complex(torch.zeros_like(a), -a).conj().imag
                    if a.dtype in (torch.float32, torch.float64)
                    else a
                ),
                "conjugated": lambda a: a.conj() if a.is_complex() else a,
                "gradient": lambda a: a.clone().requires_grad_() if floating(a) or a.is_complex() else a,
                "zero": lambda a: torch._efficientzerotensor(a.shape, dtype=a.dtype) if floating(a) else a,
            }
            if self.kind in every:
                made[name] = every[self.kind](a)
            elif self.kind in one and (name == target or self.kind in ("gradient", "conjugated", "strided")):
                made[name] = one[self.kind](a)
            else:
                made[name] = a
        return made

    def run(self):
        """What came of it, in a word; a fault is a word and a text."""
        arguments = self.arguments()
        try:
            return self.compared(arguments)
        except (ValueError, TypeError) as error:
            return self.refusal(error)
        except (RuntimeError, NotImplementedError) as error:
            if self.kind in ("wrapped", "fake", "zero", "conjugated") or 'use("reference")' in str(error):
                return "refused by PyTorch"
            return "fault", f"{type(error).__name__}: {error}"
        except Exception as error:
            return "fault", f"{type(error).__name__}: {error}"

    def compared(self, arguments):
        options = {} if self.implementation is None else {"implementation": self.implementation}
        function = self.spec.function()
        given = {n: a.clone() if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
        if self.kind == "fake" and isinstance(given.get("block_mask"), BlockMask):
            return "shapes alone"  # the mask's own tensors would have to be fake too
        if self.kind == "fake":
            with FakeTensorMode() as mode:
                fakes = {n: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for n, a in given.items()}
                tensors_of(function(**fakes, **options))
            return "shapes alone"
        made = self.dressed(given)
        plain = {n: unwrap(a).clone() if isinstance(a, torch.Tensor) else a for n, a in made.items()}
        if self.kind == "inference":
            with torch.inference_mode():
                found = tensors_of(function(**made, **options))
        else:
            found = tensors_of(function(**made, **options))
        if self.kind == "meta" or any(x.device.type == "meta" for x in found):
            return "shapes alone"
        with torch.no_grad():
            peer, exact, moved = (
                tensors_of(function(**arguments, implementation="reference"))
                for arguments in (copies(plain), copies(plain, wide=True), copies(plain, wide=True, noise=True))
            )
        rounded = []
        for index, (x, p, e, m) in enumerate(zip(found, peer, exact, moved, strict=True)):
            if x.shape != p.shape or x.dtype != p.dtype:
                return "fault", f"{tuple(x.shape)} {x.dtype} for {tuple(p.shape)} {p.dtype}"
            if not e.isfinite().all() or not p.isfinite().all():
                return "not finite"
            x = unwrap(x).detach()
            allowed = 16 * torch.finfo(p.dtype).eps * float(e.abs().max()) if e.numel() else 0
            simple = [(1.0, lambda e=e, allowed=allowed: e + allowed), (BAND, lambda m=m: m)]
            if Truth(e, p, simple).used(x) <= 1:
                continue
            rounded = rounded or self.rounded(plain)
            if Truth(e, p, [*simple, *((BAND / 2, lambda r=r, i=index: r[i]) for r in rounded)]).used(x) > 1:
                return "fault", f"other numbers: {x.flatten()[:4].tolist()} for {e.flatten()[:4].tolist()}"
        return "right"

    def rounded(self, plain):
        """The reference in float64 with every operation off by a rounding, as in the check's own budget.

        This takes longer, so only calls that a simpler measure finds too far off are compared with it.
        """
        made = []
        for seed in (1, 2):
            with torch.no_grad(), Rounding(torch.finfo(torch.promote_types(self.dtype, torch.float32)).eps, seed):
                outputs = self.spec.function()(**copies(plain, wide=True), implementation="reference")
            made.append(tensors_of(outputs))
        return made

    def refusal(self, error):
        message = str(error)
        names = set(inspect.signature(self.spec.function()).parameters)
        found = set(re.findall(r"`(\w+)`", message)) | set(re.findall(r"unknown (\w+)", message))
        by_python = isinstance(error, TypeError) and re.search(r"missing|unexpected keyword", message)
        if message.startswith(f"{self.op}: implementation ") and "cannot run this call" in message:
            return "implementation cannot"
        if (message.startswith(f"{self.op}: ") and found & names) or by_python:
            return "refused"
        return "fault", f"no argument named: {type(error).__name__}: {message}"


def copies(arguments, wide=False, noise=False):
    """The arguments anew; in float64; and off by a rounding of their own precision."""

    def copy(a):
        if not isinstance(a, torch.Tensor):
            return a
        a = a.detach().clone()
        if not wide or not (floating(a) or a.is_complex()):
            return a
        exact = a.to(torch.complex128 if a.is_complex() else torch.float64)
        return moved(exact, torch.finfo(a.dtype).eps, torch.randn) if noise else exact

    return {n: copy(a) for n, a in arguments.items()}


def work(seed, first, last, progress):
    """Makes the calls of these numbers; prints faults as they come and the counts at the end."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = collections.Counter()
    file = os.open(progress, os.O_WRONLY)
    for number in range(first, last):
        os.pwrite(file, b"%20d" % number, 0)
        call = Call(seed, number)
        outcome = call.run()
        word, text = outcome if isinstance(outcome, tuple) else (outcome, "")
        counts[word] += 1
        if text:
            print(json.dumps([number, f"{call}: {text:.300}"]), flush=True)
    print(json.dumps(counts), flush=True)


def fuzz(seed, calls, chunk=5000):
    """Runs so many calls in processes of their own; returns the counts and the faults."""
    counts, faults, first, told = collections.Counter(), [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        progress = os.path.join(folder, "progress")
        while first < calls:
            last = min(first + chunk, calls)
            command = [sys.executable, __file__, "--worker", str(seed), str(first), str(last), progress]
            Path(progress).write_text(str(first))
            with open(os.path.join(folder, "out"), "w+") as out:
                process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
                hangs = watch(process, progress)
                out.seek(0)
                lines = out.read().splitlines()
            for line in lines:
                if line.startswith("{"):
                    counts.update(json.loads(line))
                elif line.startswith("["):
                    faults.append(json.loads(line))
            first = last
            if process.returncode != 0:
                number = int(Path(progress).read_text())
                why = "hangs" if hangs else f"ends its process ({process.returncode}): {' '.join(lines[-3:])[-300:]}"
                faults.append([number, f"{Call(seed, number)}: {why}"])
                counts["crash"] += 1
                first = number + 1
            for number, text in faults[told:]:
                print(f"{number}: {text}", file=sys.stderr)
            told = len(faults)
            print(f"{first} of {calls} calls, {told} faults", file=sys.stderr)
    return counts, faults


def watch(process, progress):
    """Waits for the process; ends it, and returns True, where it stays at one call for too long."""
    at, since = "", time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now = Path(progress).read_text()
        if now != at:
            at, since = now, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            process.kill()
            process.wait()
            return True
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=1000, help="how many calls (1000)")
    parser.add_argument("--seed", type=int, default=0, help="which calls (0)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="make this one call, in this process")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        seed, first, last, progress = options.worker
        return work(int(seed), int(first), int(last), progress)
    if options.only is not None:
        call = Call(options.seed, options.only)
        print(call.run(), call)
        return None
    counts, faults = fuzz(options.seed, options.calls)
    print(dict(counts))
    return sys.exit(bool(faults))


if __name__ == "__main__":
    main()
