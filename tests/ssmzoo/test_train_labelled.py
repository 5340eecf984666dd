"""Classifiers: their data, what they learn from it, and what is refused."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch

import ssmzoo
from ssmzoo.train import resume, train
from ssmzoo.train.data import batch, fixed_batches
from ssmzoo.train.labelled import load_labelled
from ssmzoo.train.log import read

CONFIG = ssmzoo.ModelConfig(d_model=16, n_layers=1, pattern=["s4d"], d_input=2, n_classes=3)
IDS = ssmzoo.ModelConfig(d_model=16, n_layers=1, pattern=["s4d"], vocab_size=5, n_classes=3, bidirectional=True)
QUICK = {"steps": 4, "batch_size": 4, "length": 9, "eval_every": 2, "eval_batches": 3, "save_every": 2}


def arrays(n: int = 40, **others) -> dict[str, np.ndarray]:
    """Features whose mean tells the label, and ``others`` in their place."""
    labels = np.arange(n) % 3
    inputs = np.random.default_rng(0).normal(size=(n, 9, 2)) / 4 + labels[:, None, None]
    return {"inputs": inputs.astype(np.float32), "labels": labels} | others


@pytest.fixture
def file(tmp_path):
    def write(name: str = "data.npz", **content):
        np.savez(tmp_path / name, **(content or arrays()))
        return tmp_path / name

    return write


def test_a_fraction_is_held_out_or_a_file(file):
    path = file()
    data = load_labelled([path], CONFIG, 9, 0.2)
    assert (len(data.train), len(data.validation)) == (32, 8)
    whole = np.concatenate([data.train.inputs, data.validation.inputs])
    assert {x.tobytes() for x in whole} == {x.tobytes() for x in arrays()["inputs"]}  # every one, once
    again = load_labelled([path], CONFIG, 9, 0.2)
    assert (data.train.fingerprint(), data.validation.fingerprint()) == (
        again.train.fingerprint(),
        again.validation.fingerprint(),
    )
    assert data.train.fingerprint() != data.validation.fingerprint()
    data = load_labelled([path, file("other.npz", **arrays(7))], CONFIG, 9, 0.2)
    assert (len(data.train), len(data.validation)) == (40, 7)


def test_batches_have_inputs_with_their_labels_and_mask_the_padding(file):
    content = arrays(lengths=np.arange(40) % 9 + 1)
    data = load_labelled([file(**content)], CONFIG, 9, 0.2)
    labels = {x.tobytes(): (label, length) for x, label, length in zip(*content.values(), strict=True)}
    seen = [*fixed_batches(data.validation, 9, 3, 9), batch(data.train, 5, 9, (0, 1, 2))]
    assert [len(drawn.labels) for drawn in seen] == [3, 3, 2, 5]
    for drawn in seen:
        for x, label, mask in zip(*drawn, strict=True):
            expected, length = labels[x.numpy().tobytes()]
            assert (label, mask.tolist()) == (expected, [t < length for t in range(9)])
    assert torch.equal(seen[-1].inputs, batch(data.train, 5, 9, (0, 1, 2)).inputs)
    assert not torch.equal(seen[-1].inputs, batch(data.train, 5, 9, (0, 2, 2)).inputs)
    assert batch(load_labelled([file()], CONFIG, 9, 0.2).train, 5, 9, (0,)).mask is None


@pytest.mark.usefixtures("quick_curves")
def test_a_classifier_learns_and_goes_on(file, tmp_path):
    pytest.importorskip("accelerate", reason="needs accelerate")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    run, path = tmp_path / "run", file()
    result = train(CONFIG, path, QUICK | {"steps": 40, "lr": 0.03, "validation": 0.2}, run, quiet=True)
    rows = [row for row in read(run / "log.csv") if row["validation_loss"]]
    assert result.validation_accuracy == float(rows[-1]["validation_accuracy"]) > float(rows[0]["validation_accuracy"])
    assert result.validation_accuracy > 0.9
    assert result.validation_bits == pytest.approx(float(rows[-1]["validation_loss"]) / np.log(2))
    examples = load_labelled([path], CONFIG, 9, 0.2).validation
    right = result.model.eval()(torch.from_numpy(examples.inputs)).argmax(1).numpy() == examples.labels
    assert result.validation_accuracy == pytest.approx(right.mean())
    assert resume(run, steps=41, quiet=True).steps == 41
    np.savez(path, **arrays(labels=np.zeros(40, int)))
    with pytest.raises(ValueError, match="have changed since it started"):
        resume(run, steps=42, quiet=True)


def test_padding_counts_for_nothing(file, tmp_path):
    """Ids of several lengths, both ways: what stands in the padding changes no loss."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    lengths = np.arange(12) % 9 + 1
    losses = []
    for fill in (0, 4):
        ids = np.where(np.arange(9) < lengths[:, None], np.random.default_rng(0).integers(0, 5, (12, 9)), fill)
        path = file(f"{fill}.npz", inputs=ids, labels=np.arange(12) % 3, lengths=lengths)
        losses.append(train(IDS, [path, path], QUICK, tmp_path / str(fill), quiet=True).validation_loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("config", "content", "message"),
    [
        (CONFIG, {"inputs": np.zeros((3, 9, 2))}, "the array `labels` is missing"),
        (CONFIG, arrays(lables=np.zeros(40)), "unknown array: 'lables'. Did you mean 'labels'"),
        (CONFIG, arrays(inputs=np.zeros((40, 9))), r"`inputs` must be features \(n, l, d_input=2\), .* got float64 "),
        (CONFIG, arrays(inputs=np.zeros((40, 9, 3))), r"`inputs` must be features .* got float64 \(40, 9, 3\)"),
        (CONFIG, arrays(inputs=np.full((40, 9, 2), np.nan)), "`inputs` must be finite"),
        (CONFIG, arrays(inputs=np.zeros((40, 10, 2))), "has 10 steps, and `length` allows 9: add --set length=10"),
        (CONFIG, arrays(labels=np.arange(40) % 4), "`labels` must be from 0 to 2; got 0 to 3"),
        (CONFIG, arrays(labels=np.zeros(39, int)), r"`labels` must be integers, one for each of 40; got int64 \(39,\)"),
        (CONFIG, arrays(labels=np.zeros(40)), "`labels` must be integers, .* got float64"),
        (CONFIG, arrays(lengths=np.arange(40)), "`lengths` must be from 1 to 9; got 0 to 39"),
        (CONFIG, {k: v[:1] for k, v in arrays().items()}, "`validation` leaves none of 1 sequences to train on"),
        (IDS, arrays(), r"`inputs` must be ids \(n, l\), at least one; got float32"),
        (IDS, arrays(inputs=np.full((40, 9), 5)), "`inputs` must be from 0 to 4; got 5 to 5"),
        (IDS, arrays(inputs=np.zeros((0, 9), int)), "`inputs` must be ids .* at least one"),
    ],
)
def test_arrays_that_do_not_serve(file, config, content, message):
    with pytest.raises(ValueError, match=message):
        load_labelled([file(**content)], config, 9, 0.2)


def test_files_that_do_not_serve(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file none\.npz"):
        load_labelled(["none.npz"], CONFIG, 9, 0.2)
    (tmp_path / "text.txt").write_text("a text")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("text.txt", "one.npy"):
        with pytest.raises(ValueError, match=r"a classifier trains on a \.npz file .* is none"):
            load_labelled([tmp_path / name], CONFIG, 9, 0.2)
    for sources in ([], [file()] * 3):
        with pytest.raises(ValueError, match=r"or on two such files, .* got [03] files"):
            load_labelled(sources, CONFIG, 9, 0.2)
    with pytest.raises(ValueError, match="`data` of a classifier must be a .npz file"):
        train(CONFIG, np.zeros(3, int), QUICK, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def member(kind: str) -> bytes:
    """The file of one array inside a .npz file, damaged."""
    stream = io.BytesIO()
    np.save(stream, arrays()["inputs"])
    whole = stream.getvalue()
    return {
        "raw": b"some text",
        "empty": b"",
        "magic alone": whole[:6],
        "header cut": whole[:40],
        "header no literal": whole.replace(b"'descr'", b"'descr\""),
        "no such dtype": whole.replace(b"<f4", b"<q9"),
        "shape too large": whole.replace(b"(40, 9, 2)", b"(40,9,2**9)").replace(b"2**9", b"9999"),
        "objects": whole.replace(b"<f4", b"|O8"),
        "data cut": whole[:-10],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "raw",
        "empty",
        "magic alone",
        "header cut",
        "header no literal",
        "no such dtype",
        "shape too large",
        "objects",
        "data cut",
        "checksum",
        "encrypted",
    ],
)
def test_a_damaged_array_is_named(tmp_path, kind):
    path = tmp_path / "data.npz"
    stream = io.BytesIO()
    np.save(stream, arrays()["labels"])
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("labels.npy", stream.getvalue())
        file.writestr("inputs.npy", member(kind if kind not in ("checksum", "encrypted") else "raw"))
    if kind == "checksum":
        path.write_bytes(path.read_bytes().replace(b"some text", b"same text"))
    elif kind == "encrypted":
        content = bytearray(path.read_bytes())
        content[content.rindex(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.npz: .*`inputs` (is damaged|must be an array)") as error:
        load_labelled([path], CONFIG, 9, 0.2)
    assert "\n" not in str(error.value)


def test_numbers_beyond_float32_are_refused(file):
    for value in (1e300, -1e39):
        inputs = arrays()["inputs"].astype(np.float64)
        inputs[3, 2, 1] = value
        with pytest.raises(
            ValueError, match=r"`inputs` must be within float32, from -3\.4e\+38 to 3\.4e\+38; got .*e\+"
        ):
            load_labelled([file(**arrays(inputs=inputs))], CONFIG, 9, 0.2)
