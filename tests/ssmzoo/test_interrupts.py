"""Ctrl-C while processes are being started: it is never lost, and they never hear it."""

import contextlib
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
        signal.raise_signal(signal.SIGINT)  # to this thread alone, so that it is pending at once
        assert not heard
    assert heard == [signal.SIGINT]
    with pytest.raises(ZeroDivisionError), starting():
        signal.raise_signal(signal.SIGINT) or 1 / 0
    assert heard == [signal.SIGINT] * 2
    with starting():
        pass
    signal.raise_signal(signal.SIGINT)
    assert heard == [signal.SIGINT] * 3


def test_what_is_started_inside_has_it_blocked():
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with starting():
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (inside.stdout, after.stdout) == ("True\n", "False\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "at"),
    [("corpora", at) for at in ("Pipe()", "the first start", "the second start", "work")]
    + [("planning", "the second start"), ("bench", "work")],
)
def test_a_group_is_interrupted(way, at, tmp_path):
    """At any moment, and the whole group ends without a word from any of its processes."""
    (tmp_path / "forever.py").write_text(
        "import pathlib, time\ndef sleep(seconds): pathlib.Path('at work').touch(); time.sleep(seconds)\n"
        "def sleep_in(group): sleep(600)\n"
    )
    code = f"""
        import multiprocessing.process, os, signal, sys, threading, time
        from forever import sleep, sleep_in

        calls = []

        def interrupted(function):
            def call(*args, **kwargs):
                calls.append(function.__qualname__)
                if len(calls) == {2 if at == "the second start" else 1}:
                    os.killpg(0, signal.SIGINT)
                return function(*args, **kwargs)
            return call

        def interrupt_work():
            while not os.path.exists("at work"):
                time.sleep(0.01)
            os.killpg(0, signal.SIGINT)

        if __name__ == "__main__":
            import {WAYS[way][0]} as way  # before anything is sent: an import that is cut short may print
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if {at!r} == "work":
                threading.Thread(target=interrupt_work, daemon=True).start()
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
    job = subprocess.Popen(
        [sys.executable, "main.py"], cwd=tmp_path, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    try:
        out, err = job.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert (job.returncode, out, err) == (0, "interrupted\n", "")
