"""``make test OP=...`` and ``MIXER=...`` run the tests that name an op or mixer, or are marked with it."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

import ssmzoo
from ssmkernels import OPS

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def conftest(request):
    """The module of that name, which pytest has imported."""
    (plugin,) = (p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "_subjects"))
    return plugin


def item(path, name, **marks):
    """What the selection sees of a test."""
    made = {kind: getattr(pytest.mark, kind)(*names).mark for kind, names in marks.items()}
    return types.SimpleNamespace(path=FOLDER / path, name=name, get_closest_marker=made.get, fixturenames=())


@pytest.mark.parametrize(
    ("test", "subjects"),
    [
        (
            item("kernels/test_specs.py", "test_every_case[torch.float32-selective_scan_step-cpu]"),
            {"selective_scan_step"},
        ),
        (item("kernels/test_decode_attention.py", "test_pages[3]"), {"decode_attention"}),
        (item("kernels/test_native.py", "test_info"), set()),
        (item("kernels/test_masks.py", "test_causal[4]", op=["attention"]), {"attention"}),
        (item("kernels/test_masks.py", "test_causal[fft_conv]", op=["attention"]), {"fft_conv"}),
        (item("kernels/test_triton_offline.py", "test_compiles[sm_90]", op=[]), set(OPS)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_subjects_of_a_test(test, subjects, conftest):
    assert conftest._subjects(test, "op", OPS) == subjects


def test_an_op_brings_those_of_its_folder(conftest):
    names = ["test_x[selective_scan]", "test_x[selective_scan_step]", "test_x[causal_conv1d]", "test_x"]
    items = [item("kernels/test_specs.py", name) for name in names]
    elsewhere = item("ssmzoo/test_mamba.py", "test_selective_scan")
    for op in ("selective_scan", "selective_scan_step"):
        assert conftest._of_ops([op], [*items, elsewhere]) == items[:2]


def test_mixers(conftest):
    found = [item("ssmzoo/test_mixers.py", f"test_property[{name}-d_state=3]") for name in ssmzoo.list_mixers()]
    for name, own in zip(ssmzoo.list_mixers(), found, strict=True):
        kernel = item("kernels/test_specs.py", f"test_every_case[{name}]")
        assert conftest._of_mixers([name], [*found, kernel]) == [own]


def test_the_folder_of_every_op_has_a_file_or_a_marker():
    paths = (FOLDER / "kernels").glob("test_*.py")
    named = [path.stem + " ".join(re.findall(r"mark\.op\(.*?\)", path.read_text())) for path in paths]
    folders = {op.package.rpartition(".")[2] for op in OPS.values()}
    assert [folder for folder in folders if not any(folder in names for names in named)] == []


def test_long_tests_come_first_on_each_worker(conftest):
    items = [item(f"test_{i // 3}.py", str(i), **({"slow": []} if i in (1, 3, 5, 7) else {})) for i in range(10)]
    assert [i.name for i in conftest._dealt(items, 2)] == ["1", "7", "0", "2", "4", "3", "5", "6", "8", "9"]
    assert [i.name for i in conftest._dealt(items[3:6:2], 4)] == ["3", "5"]
    for i in (1, 3):  # which share a process though they are in two files
        items[i].fixturenames = ["_interpreter"]
    assert [i.name for i in conftest._dealt(items, 2)] == ["1", "3", "7", "0", "2", "5", "4", "6", "8", "9"]


def test_an_unknown_name_is_an_error(conftest):
    with pytest.raises(pytest.UsageError, match="unknown op: 'selective_scam'. Did you mean 'selective_scan'"):
        conftest._check("op", ["attention", "selective_scam"], OPS)
    with pytest.raises(pytest.UsageError, match="unknown mixer: 'mambo'. Did you mean 'mamba'"):
        conftest._check("mixer", ["mambo"], ssmzoo.list_mixers())
