"""Ctrl-C while processes are being started: it is never lost, and they never hear it."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from ssmzoo.interrupts import starting

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")

# Each of the three ways to run processes, on work that takes for ever
WAYS = {
    "corpora": ("ssmzoo.train.corpora.processes", "list(way.over_processes(sleep, [600.0] * 2, 2))"),
    "planning": ("ssmzoo.planning.ranks", "way.on_ranks(2, sleep, 600.0)"),
    "bench": ("ssmzoo.bench.ranks", "way.together(2, sleep_in)"),
}


@pytest.fixture
def heard():
    """The signals that this process has handled."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGINT, before)


def test_one_that_comes_meanwhile_is_raised_afterwards(heard):
    with starting():
        os.kill(os.getpid(), signal.SIGINT)
        assert not heard
    assert heard == [signal.SIGINT]
    with pytest.raises(ZeroDivisionError), starting():
        os.kill(os.getpid(), signal.SIGINT) or 1 / 0
    assert heard == [signal.SIGINT] * 2
    with starting():
        pass
    os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGINT] * 3


def test_what_is_started_inside_has_it_blocked():
    code = "import signal; signal.raise_signal(signal.SIGINT); print('deaf')"
    with starting():
        job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert job.stdout == "deaf\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "at"),
    [("corpora", at) for at in ("Pipe()", "the first start", "the second start", "work")]
    + [("planning", "the second start"), ("bench", "work")],
)
def test_a_group_is_interrupted(way, at, tmp_path):
    """At any moment, and the whole group ends without a word from any of its processes."""
    (tmp_path / "forever.py").write_text("import time\nsleep = time.sleep\ndef sleep_in(group): time.sleep(600)\n")
    code = f"""
        import multiprocessing.process, os, signal, sys, threading
        from forever import sleep, sleep_in

        calls = []

        def interrupted(function):
            def call(*args, **kwargs):
                calls.append(function.__qualname__)
                if len(calls) == {2 if at == "the second start" else 1}:
                    os.killpg(0, signal.SIGINT)
                return function(*args, **kwargs)
            return call

        if __name__ == "__main__":
            import {WAYS[way][0]} as way  # before anything is sent: an import that is cut short may print
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if {at!r} == "work":
                threading.Timer(4, os.killpg, (0, signal.SIGINT)).start()
            elif {at!r} == "Pipe()":
                import multiprocessing.connection
                multiprocessing.connection.Pipe = interrupted(multiprocessing.connection.Pipe)
            else:
                start = multiprocessing.process.BaseProcess.start
                multiprocessing.process.BaseProcess.start = interrupted(start)
            try:
                {WAYS[way][1]}
            except KeyboardInterrupt:
                print("interrupted")
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(code))
    job = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, start_new_session=True, timeout=300
    )
    assert (job.returncode, job.stdout, job.stderr) == (0, "interrupted\n", "")
