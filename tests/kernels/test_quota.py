"""The cores that a container's quotas of time are worth."""

from __future__ import annotations

import warnings

import pytest
import torch

from ssmkernels import native
from ssmkernels.native import quota


def machine(root, cgroup, files):
    """The files of a system, in a folder."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        (
            "0::/outer/inner\n",
            {"sys/fs/cgroup/outer/cpu.max": "150000 100000\n", "sys/fs/cgroup/outer/inner/cpu.max": "400000 100000\n"},
            2,
        ),
        (
            "7:memory:/a\n4:cpu,cpuacct:/docker/a\n0::/a\n",
            {
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ("4:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "torn"}, None),
    ],
)
def test_quota(tmp_path, cgroup, files, cores):
    assert quota.cores(machine(tmp_path, cgroup, files)) == cores


def test_elsewhere_than_on_linux(tmp_path):
    assert quota.cores(tmp_path) is None


@pytest.mark.skipif(native.missing() is not None, reason="needs the native library")
@pytest.mark.parametrize(("cores", "threads", "warned"), [(1, 2, True), (2, 2, False), (None, 2, False)])
def test_more_threads_than_the_container_has_cores_are_told(cores, threads, warned, monkeypatch):
    monkeypatch.setattr(quota, "cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    limits = []
    library = type("Library", (), {"__getattr__": lambda self, name: getattr(real, name)})()
    real = native.library().handle
    library.ssmzoo_limit_threads = limits.append  # the process's own library keeps its threads
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: library)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert native.library.__wrapped__().missing is None
    assert ["set_num_threads(1)" in str(w.message) for w in said] == ([True] if warned else [])
    assert all(w.filename == __file__ for w in said)  # not a line of ours
    assert limits == ([] if cores is None else [cores])
