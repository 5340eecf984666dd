"""Python programs in forks of one process, which has imported what they need.

A new process for each would spend most of its time on imports: PyTorch and we take three seconds, transformers as many
again. Run as a script, this file is that process; its argument is a program that prepares it. It reads a line for each
request, and answers with the exit status of each fork.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple


class Done(NamedTuple):
    """How a program ended: its exit status, and what it wrote."""

    status: int
    out: str
    err: str


class Forks:
    """The other process, started at the first program."""

    def __init__(self, prelude: Path, environment: Mapping[str, str] | None = None):
        self.prelude, self.environment = prelude, environment
        self.process: subprocess.Popen[str] | None = None

    def run(self, program: Path, *arguments: str, folder: Path | None = None, **environment: str) -> Done:
        """Runs a program in a folder, as ``python program arguments`` does."""
        (done,) = self.together(program, [arguments], folder=folder, **environment)
        return done

    def together(
        self, program: Path, calls: Sequence[Sequence[str]], *, folder: Path | None = None, **environment: str
    ) -> list[Done]:
        """Likewise once for each sequence of arguments, all at the same time."""
        if self.process is None:
            command, pipe = [sys.executable, "-W", "ignore", __file__, str(self.prelude)], subprocess.PIPE
            self.process = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, text=True)
        with tempfile.TemporaryDirectory() as outputs:
            files = [Path(outputs, str(i)) for i in range(len(calls))]
            request = {"program": str(program), "folder": str(folder or Path.cwd()), "environment": environment}
            request["calls"] = [[str(file), *map(str, call)] for file, call in zip(files, calls, strict=True)]
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            assert answer, f"the process that forks has ended with {self.process.poll()}"
            found = zip(json.loads(answer), files, strict=True)
            return [Done(status, file.read_text(), file.with_suffix(".err").read_text()) for status, file in found]

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def started(request: dict[str, Any], output: str, arguments: list[str]) -> int:
    """The id of a fork that runs the program."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number, file in enumerate((output, f"{output}.err"), 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        sys.argv[:] = [request["program"], *arguments]
        sys.path[0] = str(Path(request["program"]).parent)
        runpy.run_path(request["program"], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)  # of a fork: a tenth of its time otherwise, where it compiles
    for line in sys.stdin:
        request = json.loads(line)
        children = [started(request, output, arguments) for output, *arguments in request["calls"]]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    prelude = Path(sys.argv[1])
    sys.path[0] = str(prelude.parent)
    runpy.run_path(str(prelude))
    serve()
