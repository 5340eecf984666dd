"""GGUF files as somebody might make them to do harm: each is read, or refused in one clear line, in little memory."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf_attack
import pytest
from gguf_bytes import DAMAGES, File, taken_apart, text
from gguf_models import MODELS, random_model

import ssmzoo
from ssmzoo.checkpoints.gguf.header import LONGEST, read_header

pytest.importorskip("gguf", reason="needs the gguf package")
linux = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc, for a process's memory")

NAMES = list(MODELS)
GROUPS = [NAMES[i::2] for i in range(2)]


@linux
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_damaged_files(tmp_path, group):
    """Cut off, with flipped bits, lying counts, other values, keys, tensors and numbers, of each architecture.

    SSMZOO_DAMAGES=420 makes that many of each, in place of one of each kind.
    """
    n, seed = int(os.environ.get("SSMZOO_DAMAGES", len(DAMAGES))), int(os.environ.get("SSMZOO_SEED", "0"))
    command = [sys.executable, "-W", "error", gguf_attack.__file__, tmp_path, n, seed, *GROUPS[group]]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env=_environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


def _environment() -> dict[str, str]:
    """With what this process can import."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small file, taken apart."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    ssmzoo.save(random_model("falcon-h1 with a norm", vocab_size=256), path, "gguf", tokenizer="bytes")
    return taken_apart(path.read_bytes())


def with_key(file: File, name: bytes, kind: int, value: bytes) -> File:
    """A file with one of its keys changed, or one key more."""
    file = file.copy()
    file.keys = [key for key in file.keys if key[0] != name] + [(name, kind, value)]
    return file


def written(tmp_path: Path, file: File) -> Path:
    (tmp_path / "model.gguf").write_bytes(file.bytes())
    return tmp_path / "model.gguf"


def test_names_from_a_file_stay_in_one_line(tmp_path, whole):
    file = whole.copy()
    file.tensors[3].name, file.tensors[4].name = b"x\n\x1b[2J", b"blk.9" + b"9" * 5000
    with pytest.raises(ValueError, match=r"none of llama.cpp's Falcon-H1: 'x\\n\\x1b\[2J', blk\.9+…$") as error:
        ssmzoo.build(written(tmp_path, file))
    assert len(str(error.value)) < 500


def test_memory_is_made_only_for_what_the_file_holds(tmp_path, whole):
    """A key asks for buffers of 64 GiB, beside weights of a few kilobytes."""
    file = with_key(whole, b"falcon-h1.ssm.state_size", 4, struct.pack("<I", 2**32 - 1))
    with pytest.raises(ValueError, match=r"model\.gguf do not fit the config. Tensors of another shape: .*in_proj"):
        ssmzoo.build(written(tmp_path, file))


def test_the_vocabulary_is_passed_over_and_other_lists_are_short(tmp_path, whole):
    header = read_header(written(tmp_path, whole))
    assert header.keys["tokenizer.ggml.tokens"] is None
    assert header.keys["tokenizer.ggml.token_type"] is None
    assert header.keys["tokenizer.ggml.pre"] == "gpt-2"
    many = struct.pack("<IQ", 0, LONGEST + 1) + bytes(LONGEST + 1)
    ssmzoo.build(written(tmp_path, with_key(whole, b"tokenizer.ggml.scores", 9, many)))
    with pytest.raises(ValueError, match="'general.x' has 65537 values, and may have 65536"):
        ssmzoo.build(written(tmp_path, with_key(whole, b"general.x", 9, many)))
    for kind, n, said in ((0, 2**61, "ends within"), (8, 2**61, "ends within"), (9, 1, "unknown kind 9")):
        file = with_key(whole, b"tokenizer.ggml.scores", 9, struct.pack("<IQ", kind, n))
        with pytest.raises(ValueError, match=said):
            ssmzoo.build(written(tmp_path, file))


@pytest.mark.parametrize(
    ("kind", "value"), [(4, struct.pack("<I", 7)), (9, struct.pack("<IQ", 8, 1) + text(b"mamba")), (7, b"\x01")]
)
def test_an_architecture_is_a_text(tmp_path, whole, kind, value):
    with pytest.raises(ValueError, match="`general.architecture` must be a text; got"):
        ssmzoo.build(written(tmp_path, with_key(whole, b"general.architecture", kind, value)))


@pytest.mark.filterwarnings("error")
def test_scales_that_are_no_numbers(tmp_path):
    ssmzoo.save(random_model("lfm2"), tmp_path / "model.gguf", "gguf", dtype="q8_0")
    file = taken_apart((tmp_path / "model.gguf").read_bytes())
    data = bytearray(file.data)
    place = next(tensor.offset for tensor in file.tensors if tensor.name == b"blk.0.ffn_down.weight")
    data[place : place + 2] = struct.pack("<H", 0x7E00)
    file.data = bytes(data)
    with pytest.raises(ValueError, match=r"of unfit values: layers\.0\.mlp\.fc2\.weight has NaN"):
        ssmzoo.build(written(tmp_path, file))


@pytest.mark.parametrize(
    ("model", "key", "kind", "value", "said"),
    [
        (
            "mamba",
            "embedding_length",
            8,
            text(b"64"),
            "`mamba.embedding_length` must be a whole number .*; got '64'",
        ),
        ("mamba", "embedding_length", 4, bytes(4), "`mamba.embedding_length` must be at least 1; got 0"),
        ("mamba", "block_count", 7, b"\x01", "`mamba.block_count` must be a whole number from 0 on; got True"),
        ("mamba", "ssm.dt_b_c_rms", 8, text(b"no"), "`mamba.ssm.dt_b_c_rms` must be true or false; got 'no'"),
        (
            "jamba",
            "attention.head_count_kv",
            9,
            struct.pack("<IQi", 5, 1, -1),
            "must be a whole number from 0 on; got",
        ),
        ("rwkv6", "rescale_every_n_layers", 5, b"\xff" * 4, "must be a whole number from 0 on; got -1"),
        ("falcon-h1", "rope.freq_base", 6, struct.pack("<f", math.inf), "`falcon-h1.rope.freq_base` must be a finite"),
        (
            "lfm2 with experts",
            "expert_gating_func",
            4,
            struct.pack("<I", 1),
            "`expert_gating_func` must be 2, a sigmoid",
        ),
        (
            "kimi-linear",
            "expert_gating_func",
            4,
            struct.pack("<I", 1),
            "`expert_gating_func` must be 2, a sigmoid; got 1",
        ),
    ],
)
def test_values_of_another_kind_are_refused_by_their_key(tmp_path, model, key, kind, value, said):
    ssmzoo.save(random_model(model), tmp_path / "model.gguf", "gguf")
    file = taken_apart((tmp_path / "model.gguf").read_bytes())
    prefix = next(value for name, _, value in file.keys if name == b"general.architecture")[8:].decode()
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{said}"):
        ssmzoo.build(written(tmp_path, with_key(file, f"{prefix}.{key}".encode(), kind, value)))
