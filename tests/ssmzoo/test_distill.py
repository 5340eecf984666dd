"""Distillation in stages: each brings the hybrid nearer to its teacher, stops and goes on, and says what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import ssmzoo
from ssmzoo.train import Interrupted, TrainConfig, distill, loop, resume, resume_distill, train
from ssmzoo.train import finish as finish_module
from ssmzoo.train.alignment import Alignment
from ssmzoo.train.corpora import tokenize
from ssmzoo.train.distill import DistillConfig
from ssmzoo.train.log import read
from ssmzoo.yaml_text import read_mapping

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("matplotlib", reason="needs matplotlib")
pytestmark = pytest.mark.usefixtures("quick_curves")

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
CONFIG = ssmzoo.ModelConfig.from_dict(
    {
        "d_model": 16,
        "n_layers": 2,
        "pattern": ["attention"],
        "mixers": {"attention": {"head_dim": 8, "n_kv_heads": 1}},
        "mlp": {"kind": "swiglu"},
        "vocab_size": 256,
    }
)
TRAIN = {"batch_size": 4, "length": 24, "eval_every": 100, "eval_batches": 4, "lr": 1e-2, "save_every": 100}
SHORT = {"steps": 4}
STAGES = {"matrix": SHORT, "hidden": SHORT, "logits": SHORT}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat, and the dog sat on the log\n" * 100)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, text):
    torch.manual_seed(0)
    return train(CONFIG, text, TRAIN | {"steps": 40}, tmp_path_factory.mktemp("runs") / "teacher", quiet=True).folder


@pytest.fixture(autouse=True)
def short_sample(monkeypatch):
    monkeypatch.setattr(finish_module, "SAMPLE", 10)


def test_each_stage_comes_nearer(tmp_path, teacher, text):
    stages = {"matrix": {"steps": 15}, "hidden": {"steps": 20}, "logits": {"steps": 20, "lr": 1e-3}}
    found = ssmzoo.distill(
        {"teacher": str(teacher), "train": TRAIN, "stages": stages}, text, tmp_path / "run", quiet=True
    )
    assert list(found.stages) == ["matrix", "hidden", "logits"]
    bits = []
    for stage, result in found.stages.items():
        rows = read(result.folder / "log.csv")
        assert float(rows[-1]["validation_loss"]) < 0.9 * float(rows[0]["validation_loss"]), stage
        bits += [float(rows[0]["validation_bits_per_byte"]), result.validation_bits]
        assert rows[1]["bits_per_byte"] == ""
    before, after_matrix, matrix, after_hidden, hidden, after_logits = bits
    assert max(after_matrix, after_hidden, after_logits) < before
    assert (after_matrix, after_hidden) == (matrix, hidden)
    again, ids = ssmzoo.build(tmp_path / "run" / "3-logits"), torch.arange(60, 72)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids), found.model.eval()(ids))
    assert again.config.pattern == ["mamba2"] * 2


def test_a_stop_in_any_stage_changes_nothing(tmp_path, teacher, text, monkeypatch, capsys):
    config = {"teacher": str(teacher), "pattern": "layers.1", "train": TRAIN, "stages": STAGES}
    whole = distill(config, text, tmp_path / "whole", quiet=True).model.state_dict()
    draw, parts, steps = loop.batch, tmp_path / "parts", []

    def batch(*arguments):
        steps.append(1)
        if len(steps) in (2, 8, 10):  # one in the first stage and two in the second or third
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*arguments)

    monkeypatch.setattr(loop, "batch", batch)
    with pytest.raises(Interrupted, match=f"after step 2; continue with: ssmzoo distill --resume {parts}"):
        distill(config, text, parts, quiet=True)
    for _ in range(5):
        try:
            found = resume_distill(parts, quiet=True)
            break
        except Interrupted:
            continue
    assert len(steps) == 12
    for name, weight in found.model.state_dict().items():
        assert torch.equal(weight, whole[name]), name
    complete = resume_distill(parts, quiet=True)
    assert complete.stages == {}
    assert torch.equal(complete.model.embedding.weight, whole["embedding.weight"])
    with pytest.raises(ValueError, match="is a stage of a distillation: continue it with `ssmzoo distill --resume"):
        resume(parts / "1-matrix", steps=9)


def test_a_stage_moves_what_it_reaches(tmp_path, teacher, text):
    before = ssmzoo.build(teacher).state_dict()
    config = {"teacher": str(teacher), "pattern": ["layers.0"], "train": TRAIN, "stages": {"matrix": SHORT}}
    found = distill(config, text, tmp_path / "run", quiet=True).model.state_dict()
    for name, weight in before.items():
        if not name.startswith("layers.0.mixer."):
            assert torch.equal(found[name], weight), name
    v, k = [f"layers.0.mixer.{x}_proj.weight" for x in ("v", "k")]
    _, x, B, _, _ = found["layers.0.mixer.in_proj.weight"].split([16, 16, 16, 16, 2])
    assert torch.equal(x, before[v].repeat(2, 1))  # values are in no matrix
    assert not torch.equal(B, before[k].repeat(2, 1))


def test_distances():
    """Each by its equation, from layers called by hand."""
    torch.manual_seed(0)
    teacher, ids = ssmzoo.build(CONFIG).eval(), torch.randint(256, (2, 7))
    student = ssmzoo.linearize(teacher, mixer="gla").model.eval()
    u0 = teacher.layers[0].norm(teacher.embedding(ids))
    y0 = teacher.layers[0].mixer(u0)
    x1 = teacher.embedding(ids) + y0
    x1 = x1 + teacher.layers[0].mlp(teacher.layers[0].norm2(x1))
    u1 = teacher.layers[1].norm(x1)
    y1 = teacher.layers[1].mixer(u1)
    layers = [(a.mixer, b.mixer) for a, b in zip(teacher.layers, student.layers, strict=True)]
    inputs = list(zip(layers, (u0, u1), (y0, y1), strict=True))
    matrix = [((b.matrix(u) - a.matrix(u)) ** 2).sum((2, 3)).mean() / 7 for (a, b), u, _ in inputs]
    hidden = [((b(u) - y) ** 2).sum() / (y**2).sum() for (_, b), u, y in inputs]
    p, q = teacher(ids).softmax(-1), student(ids).softmax(-1)
    logits = (p * (p.log() - q.log())).sum(-1).mean()
    for stage, expected in (("matrix", sum(matrix) / 2), ("hidden", sum(hidden) / 2), ("logits", logits)):
        torch.testing.assert_close(Alignment(teacher, student, [0, 1], stage)(ids), expected, rtol=1e-4, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    one = Alignment(teacher, student, [1], "hidden")(ids)
    torch.testing.assert_close(one, hidden[1], rtol=1e-4, atol=1e-6)


def test_a_teacher_given_as_a_model(tmp_path):
    torch.manual_seed(0)
    teacher, ids = ssmzoo.build(CONFIG), torch.randint(256, (2000,))
    config = {"mixer": "gla", "train": TRAIN | {"steps": 2}, "stages": {"hidden": None}}
    found = distill(config, ids, tmp_path / "run", teacher=teacher, quiet=True)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.equal(ssmzoo.build(tmp_path / "run" / "teacher").embedding.weight, teacher.embedding.weight)
    assert F.cosine_similarity(found.model.lm_head.weight, teacher.lm_head.weight).min() > 0.999
    shutil.rmtree(tmp_path / "run" / "2-hidden")
    with pytest.raises(ValueError, match="was trained on an array of ids: give the same as `data`"):
        resume_distill(tmp_path / "run")
    again = resume_distill(tmp_path / "run", ids, quiet=True)
    for name, weight in found.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({}, ValueError, "the key `teacher` is missing"),
        ({"teacher": "x", "mixers": "gla"}, ValueError, "unknown key of distill: 'mixers'. Did you mean 'mixer'"),
        ({"teacher": "x", "stages": {"logit": {}}}, ValueError, "unknown stage of distill: 'logit'. Did you mean"),
        ({"teacher": "x", "stages": {}}, ValueError, "`stages` must hold some of matrix, hidden, logits; got none"),
        ({"teacher": "x", "stages": {"matrix": 5}}, TypeError, "`stages.matrix` must be dict; got 5"),
        (
            {"teacher": "x", "train": {"stesp": 5}},
            ValueError,
            "unknown training setting: 'stesp'. Did you mean",
        ),
        ({"teacher": "x", "pattern": 3}, TypeError, "`pattern` must be tuple; got 3"),
        ({"teacher": "s4-classifier"}, ValueError, "`teacher` must be a language model, from tokens to tokens"),
        (
            {"teacher": "mamba2-tiny"},
            ValueError,
            "in `pattern` matches no layer of attention; there is none",
        ),
    ],
)
def test_what_is_refused(tmp_path, config, error, match):
    with pytest.raises(error, match=match):
        distill(config, None, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folders_and_processes(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty: continue with `ssmzoo distill --resume"):
        distill({"teacher": "x"}, None, tmp_path)
    with pytest.raises(FileNotFoundError, match="is no distillation: there is no distill.yaml in it"):
        resume_distill(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="distill: `WORLD_SIZE` must be 1, as it runs in one process; got 2"):
        distill({"teacher": "x"}, None, tmp_path / "new")


def test_too_little_text_is_refused_before_anything_is_made(tmp_path, teacher):
    (tmp_path / "short.txt").write_text("too short " * 4)
    with pytest.raises(ValueError, match="data has .* tokens, and one sequence takes"):
        ssmzoo.distill({"teacher": str(teacher), "train": TRAIN}, tmp_path / "short.txt", tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


def test_a_corpus_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    tokenize(tmp_path / "text.txt", tmp_path / "corpus", workers=1)
    with pytest.raises(ValueError, match="`data` must be text or ids; got the corpus .*corpus, which only training"):
        distill({"teacher": "transformer++-tiny"}, tmp_path / "corpus", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_example():
    config = DistillConfig.of(read_mapping(EXAMPLES / "distill.yaml"))
    assert config.wanted == ["matrix", "hidden", "logits"]
    assert config.pattern == ("layers.1", "layers.3")


def test_settings_of_a_stage_come_after_those_of_all():
    config = DistillConfig.of({"teacher": "x", "train": {"steps": 7, "lr": 0.1}, "stages": {"logits": {"lr": 0.2}}})
    assert config.wanted == ["logits"]
    assert config.settings("logits") == TrainConfig(steps=7, lr=0.2, weight_decay=0.0)


def test_the_command(tmp_path, teacher, text, monkeypatch, capsys):
    from ssmzoo import cli

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ssmzoo", "distill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code or 0, out.out, out.err

    monkeypatch.chdir(tmp_path)
    config = {"teacher": str(teacher), "train": TRAIN, "stages": {"hidden": SHORT, "logits": SHORT}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    code, out, _ = run("small.yaml", "--data", text, "--set", "mixer=gla", "--set", "stages.logits.steps=3")
    assert code == 0
    assert "small: hidden: " in out
    assert "All of it is in runs/small/3-logits" in out
    assert len(read(tmp_path / "runs" / "small" / "3-logits" / "log.csv")) == 4
    assert run("--resume", "runs/small")[0] == 0
    assert run() == (1, "", "error: `CONFIG` is missing; name a YAML file, whose keys `ssmzoo distill --help` shows\n")
    code, _, err = run("--resume", "runs/small", "--set", "mixer=gla")
    assert (code, err) == (1, "error: --resume continues with what is in the folder; leave out --set\n")
