"""Beam search, several ends, stop strings, threads, and logits that are not finite."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import typer

import ssmzoo
from ssmzoo import pretrained
from ssmzoo.commands import generate as command
from ssmzoo.commands.generate import Shown
from ssmzoo.decoding import decoder
from ssmzoo.generate import beams

VOCAB = 7


def build(pattern: str = "lstm", seed: int = 0, **changes: object) -> ssmzoo.SequenceModel:
    torch.manual_seed(seed)
    mixers = {"attention": {"head_dim": 8}} if pattern == "attention" else {}
    config = {"d_model": 16, "n_layers": 1, "vocab_size": VOCAB, "pattern": [pattern], "mixers": mixers}
    model = ssmzoo.build(config | {"tie_embeddings": False} | changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)  # far from uniform
    return model.eval()


@torch.no_grad()
def best_of_all(model: ssmzoo.SequenceModel, prompt: list[int], steps: int, ends: tuple[int, ...]) -> list[int]:
    """The continuation with the highest mean log-probability among all there are."""
    found = {}
    for ids in itertools.product(range(VOCAB), repeat=steps):
        end = next((i + 1 for i, token in enumerate(ids) if token in ends), steps)
        found[ids[:end]] = 0.0
    for length in {len(ids) for ids in found}:
        several = torch.tensor([ids for ids in found if len(ids) == length])
        whole = torch.cat([torch.tensor(prompt).expand(len(several), -1), several], dim=1)
        scores = model(whole)[:, len(prompt) - 1 : -1, :VOCAB].log_softmax(-1)
        means = scores.gather(2, several[..., None]).mean((1, 2))
        found.update(zip(map(tuple, several.tolist()), means.tolist(), strict=True))
    return list(max(found, key=found.__getitem__))


@pytest.mark.parametrize("pattern", ["lstm", "attention", "mamba"])
@pytest.mark.parametrize("ends", [(), (2,), (2, 5)])
def test_enough_beams_find_the_best_of_all(pattern, ends):
    model = build(pattern)
    prompts = [[1, 2], [3], [4, 0, 6]]
    found = model.generate(prompts, 3, num_beams=VOCAB**2, eos_id=list(ends) or None)
    for prompt, row in zip(prompts, found, strict=True):
        assert row == [*prompt, *best_of_all(model, prompt, 3, ends)]


def test_beams_are_those_of_transformers():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    for seed in range(4):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
        config = transformers.MambaConfig(**sizes, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1)
        theirs = transformers.MambaForCausalLM(config).eval()
        with torch.no_grad():
            theirs.lm_head.weight.mul_(30.0)
        shape = {"d_model": 16, "n_layers": 1, "pattern": ["mamba"], "mixers": {"mamba": {"d_state": 4}}}
        ours = ssmzoo.build({**shape, "vocab_size": 13, "tie_embeddings": False}).eval()
        ours.load_state_dict(pretrained.convert_mamba_state_dict(theirs.state_dict()))
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": [7, 9], "pad_token_id": 7}
        with torch.no_grad():
            expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert ours.generate(ids, 6, num_beams=3, eos_id=[7, 9]).tolist() == expected.tolist()


def test_a_token_of_all_beams_keeps_its_calls(monkeypatch):
    """From the second token on they are made together, by one program, which the next search takes over."""
    made = []

    class Counted(decoder.Program):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    model = build("mamba", n_layers=2)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    monkeypatch.setattr(decoder, "Program", Counted)
    expected = model.generate(prompts, 12, num_beams=3)
    assert len(made) == 1
    assert torch.equal(model.generate(prompts, 12, num_beams=3), expected)
    assert len(made) == 1
    monkeypatch.setattr(beams, "reordered", lambda state, rows: state.select(rows))  # memory of its own each time
    assert torch.equal(model.generate(prompts, 12, num_beams=3), expected)


@pytest.mark.parametrize("pattern", ["mamba", "attention", "lstm", "mlstm"])
def test_reordered_states(pattern):
    model = build(pattern)
    _, state = model(torch.tensor([[1, 2], [3, 4], [5, 6]]), model.initial_state(3))
    for rows in ([2, 0, 0], [0, 1, 2]):
        expected = [t.clone() for t in state.select(rows).tensors()]
        found = beams.reordered(state.clone(), rows)
        assert all(map(torch.equal, found.tensors(), expected))


def test_beams_refuse_what_draws():
    model = build()
    for options in (
        {"top_k": 2},
        {"temperature": 0.5},
        {"seed": 1},
        {"stream": print},
        {"repetition_penalty": 2.0},
        {"presence_penalty": 1},
        {"logit_bias": {1: 1}},
    ):
        with pytest.raises(ValueError, match=f"goes without `{next(iter(options))}`"):
            model.generate([[1]], 2, num_beams=2, **options)
    with pytest.raises(ValueError, match="`num_beams` must be an int from 1"):
        model.generate([[1]], 2, num_beams=0)


def test_several_ends():
    model = build()
    free = model.generate([[1, 2], [3, 4]], 20, seed=0)
    ended = model.generate([[1, 2], [3, 4]], 20, seed=0, eos_id=[2, 5])
    for unbound, row in zip(free, ended, strict=True):
        end = next((i for i, token in enumerate(unbound) if i >= 2 and token in (2, 5)), len(unbound))
        assert row == unbound[: end + 1]
    with pytest.raises(ValueError, match="`eos_id` must be an id from 0 to 6"):
        model.generate([[1]], 2, eos_id=[1, 7])


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 0}, {"num_beams": 2}])
def test_logits_that_are_not_finite_name_the_step(options):
    model = build()
    with torch.no_grad():
        model.embedding.weight[:] = torch.nan
        model.embedding.weight[1:3] = 0.1
    with pytest.raises(ValueError, match=r"the logits of `model` are not finite at step \d"):
        model.generate([[1, 2]], 30, **options)


def test_numbers_at_the_edge():
    model = build("attention")
    cold = model.generate([[1, 2]], 10, seed=0, temperature=1e-45)
    assert cold == model.generate([[1, 2]], 10, temperature=0)
    stop = model.generate([[1, 2]], 10**9, seed=0, stream=lambda tokens: True)
    assert len(stop[0]) == 3
    with pytest.raises(ValueError, match="`max_new_tokens` must be at most"):
        model.generate([[1]], 10**30)


def test_threads_on_a_model_in_train_mode():
    model = build(dropout=0.9, n_layers=2).train()
    prompts = [[1, 2, 3]]
    expected = model.generate(prompts, 30, temperature=0)
    found: list = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(model.generate(prompts, n, temperature=0)))
        for n in (3, 30, 10, 25) * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(row[0] == expected[0][: len(row[0])] for row in found)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("size", [1, 2, 100])
def test_text_up_to_a_stop_string(capsys, size):
    show = Shown("> ", ["stop", "st"] if size == 2 else ["stop"])
    text = "a step, a stop, more"
    for i in range(0, len(text), size):
        if show(text[i : i + size]):
            break
    show.end()
    assert capsys.readouterr().out == ("> a \n" if size == 2 else "> a step, a \n")


def call(*arguments: str) -> None:
    app = typer.Typer()
    app.command()(command.command)
    app(arguments, standalone_mode=False)


def test_the_command_says_what_is_wrong_on_a_line_of_its_own(tmp_path, capsys):
    pretrained.save(build(vocab_size=256), tmp_path / "model")
    with pytest.raises(ValueError, match="`top_k` must be"):
        call(str(tmp_path / "model"), "prompt", "--top-k", "0")
    assert capsys.readouterr().out == ""
    call(str(tmp_path / "model"), "prompt", "--num-beams", "2", "--max-new-tokens", "3")
    assert capsys.readouterr().out.startswith("prompt")
    pretrained.save(build(n_classes=3), tmp_path / "classes")
    with pytest.raises(ValueError, match="from tokens to classes"):
        call(str(tmp_path / "classes"), "prompt")
