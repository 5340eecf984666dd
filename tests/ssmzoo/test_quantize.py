"""Models in 8 and 4 bits: what they predict, how they decode, how they are saved, and what is refused."""

import argparse
import copy
import math
import pkgutil
import runpy
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

import ssmzoo
from ssmkernels import native, use
from ssmkernels.native.prepared import Program
from ssmkernels.ops.quantized_linear.reference import dequantized
from ssmzoo.linear import linear
from ssmzoo.quantized import QuantizedEmbedding, QuantizedLinear, Scheme, by_hessian, to_nearest

SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]
SIZES = {"d_model": 32, "n_layers": 2, "vocab_size": 40}


def build(pattern=("mamba",), **changes):
    torch.manual_seed(0)
    mixers = {name: SMALL[name] for name in pattern}
    return ssmzoo.build({**SIZES, "pattern": list(pattern), "mixers": mixers, **changes}).eval()


def tokens(*shape, vocab=40):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))


def values(rounded, scheme, size):
    return dequantized(*rounded, scheme.group_size, size, torch.float32)


@pytest.fixture(scope="module")
def trained():
    """A model that has learned a text in seconds, and text that it has not seen."""
    torch.manual_seed(0)
    model = ssmzoo.build(
        {
            "d_model": 64,
            "n_layers": 2,
            "vocab_size": 256,
            "pattern": ["mamba", "mamba2"],
            "mixers": {"mamba2": {"headdim": 16}},
        }
    )
    text = "".join(Path(module.__file__).read_text() for module in (argparse, typing))  # no change of ours changes it
    ids = torch.tensor(list(text.encode()))
    seen, unseen = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        at = torch.randint(0, len(seen) - 129, (8,))
        batch = torch.stack([seen[i : i + 129] for i in at])
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), seen[: 16 * 128].view(16, 128), unseen[: 32 * 129].view(32, 129)


@torch.no_grad()
def perplexity(model, text):
    logits = model(text[:, :-1])
    return math.exp(nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item())


def test_perplexity_stays(trained):
    model, seen, unseen = trained
    before = perplexity(model, unseen)
    assert before < 40, "it has learned something"
    eight = perplexity(ssmzoo.quantize(copy.deepcopy(model), "int8"), unseen)
    assert abs(eight / before - 1) < 0.003
    nearest = perplexity(ssmzoo.quantize(copy.deepcopy(model), "int4"), unseen)
    for method in ("gptq", "awq"):
        four = perplexity(ssmzoo.quantize(copy.deepcopy(model), "int4", calibrate=seen, method=method), unseen)
        assert abs(four / before - 1) < 0.03
        assert four < 1.001 * nearest
    exact = ssmzoo.quantize(copy.deepcopy(model), "int4", calibrate=seen, activations="float")
    assert abs(perplexity(exact, unseen) / before - 1) < 0.03


@torch.no_grad()
def test_gptq_stays_closer_to_the_model_than_rounding(trained):
    """By the divergence of what is predicted, which is 0 for the model itself; a perplexity may fall by luck."""
    model, seen, unseen = trained
    wanted = model(unseen).log_softmax(-1)

    def divergence(**options):
        found = ssmzoo.quantize(copy.deepcopy(model), "int4", **options)(unseen).log_softmax(-1)
        return nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean").item()

    rounded = divergence()
    assert divergence(calibrate=seen, method="gptq") < 0.9 * rounded
    assert divergence(calibrate=seen, method="awq") < 1.1 * rounded  # test_awq.py has layers that its scales help


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(8, 32), Scheme(4, 64), Scheme(4)], ids=str)
def test_rounding_to_the_nearest(scheme):
    """No weight is further from its own than half a step of its group; 0 stays 0."""
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    found = values(to_nearest(weight, scheme), scheme, 100)
    assert not found[3].any()
    for part, rounded in zip(*(t.split(scheme.group_size or 100, dim=1) for t in (weight, found)), strict=True):
        step = (part.amax(1) - part.amin(1)) / 15 if scheme.bits == 4 else part.abs().amax(1) / 127
        most = (0.51 if scheme.bits == 8 else 4) * step  # in 4 bits the ends of the range may be cut off
        assert ((part - rounded).abs() <= most[:, None]).all()
        if scheme.bits == 4:
            assert ((part - rounded).square().mean(1) <= (step / 3) ** 2).all()


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4)], ids=str)
def test_rounding_with_regard_to_the_inputs(scheme):
    """Against the exact optimum where it is known, and on correlated inputs better than the nearest numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator)
    x = torch.randn(400, 8, generator=generator) @ torch.randn(8, 96, generator=generator)
    x += 0.1 * torch.randn(400, 96, generator=generator)
    x[:, 5] = 0  # an input that is never there

    def error(rounded):
        return (x @ (values(rounded, scheme, 96) - weight).T).square().mean()

    assert error(by_hessian(weight, x.T @ x, scheme)) < 0.6 * error(to_nearest(weight, scheme))
    apart = by_hessian(weight, torch.eye(96), scheme)  # inputs that tell nothing of each other
    torch.testing.assert_close(values(apart, scheme, 96), values(to_nearest(weight, scheme), scheme, 96))


@pytest.mark.parametrize("mixer", SMALL)
def test_every_mixer(mixer):
    """All maps become quantised; with a state, tokens one by one give what the whole sequence does."""
    looks_ahead = not ssmzoo.build_mixer(mixer, 32, **SMALL[mixer]).causal
    model = build((mixer,), tie_embeddings=False)
    ids = tokens(2, 8)
    before = model(ids)
    ssmzoo.quantize(model, "int8")
    left = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "WideBiasLinear")]
    wide = {n for m in model.modules() for n in getattr(m, "float32_parameters", ())}
    assert all(any(name.endswith(n.removesuffix(".weight")) for n in wide) for name in left), left
    with torch.no_grad():
        whole = model(ids)
        assert (whole - before).norm() < 0.1 * before.norm()
        mixers = [block.mixer for block in model.blocks]
        if looks_ahead or not all(m.causal and m.has_state for m in mixers):
            return
        state, parts = model.initial_state(2, 8), []
        for t in range(8):
            y, state = model(ids[:, t : t + 1], state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("mamba", "int8"),
        ("mamba2", "int4"),
        ("mamba", {"*in_proj": "int4"}),
        ("gated_deltanet", "int8"),
        ("gated_deltanet", {"*": {"bits": 4, "group_size": 32}}),
    ],
)
def test_a_token_through_all_layers_in_one_native_call(kind, scheme, monkeypatch):
    runs, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self: (runs.append(self), run(self)))
    model = ssmzoo.quantize(build((kind,), mlp={"kind": "swiglu"}), scheme)
    state = model.initial_state(2)
    with torch.no_grad():
        for t in range(4):
            ids = torch.tensor([[1], [2]]) + t
            handle = model.layers[0].register_forward_hook(lambda *_: None)  # wants to see each layer called
            expected, after = model(ids, state.clone())
            handle.remove()
            before = state.clone()
            found, state = model(ids, state)
            for a, b in zip((found, *state.tensors()), (expected, *after.tensors()), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert len(runs) == 4
        changed = next(m for m in model.layers[1].mixer.children() if isinstance(m, QuantizedLinear))
        changed.scales = changed.scales * 2
        assert not torch.allclose(model(ids, before)[0], found)
        double, state = model.double(), model.initial_state(1)
        for _ in range(3):
            _, state = double(ids[:1], state)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_greedy_tokens_are_those_of_the_reference(trained, scheme):
    model = ssmzoo.quantize(copy.deepcopy(trained[0]), scheme)
    found = model.generate([list(b"def ")], 12, temperature=0)
    with use("reference"):
        assert model.generate([list(b"def ")], 12, temperature=0) == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
def test_saved_and_loaded(tmp_path, dtype, scheme, bits):
    model = ssmzoo.quantize(build(("mamba", "attention")).to(dtype), scheme)
    assert model.tied
    assert isinstance(model.embedding, QuantizedEmbedding)
    assert model.layers[0].mixer.in_proj.scheme.bits == bits
    assert model.layers[0].mixer.A_log.dtype == torch.float32
    ids = tokens(2, 5)
    expected = model(ids)
    assert expected.dtype == dtype
    ssmzoo.save(model, tmp_path)
    again = ssmzoo.build(str(tmp_path))
    assert again.tied
    assert again.config == model.config
    assert again.num_parameters() == model.num_parameters()
    assert again.flops_per_token(10) == model.flops_per_token(10)
    assert torch.equal(again(ids), expected)
    assert again.generate([[1, 2, 3]], 4, temperature=0)[0] == model.generate([[1, 2, 3]], 4, temperature=0)[0]


def test_moving_to_another_dtype_keeps_scales():
    model = ssmzoo.quantize(build(), {"*in_proj": "int8", "*": "int4"})
    scales = {name: t.clone() for name, t in model.state_dict().items() if name.endswith("scales")}
    model.to(torch.bfloat16)
    assert model(tokens(1, 3)).dtype == torch.bfloat16
    assert model.tied
    for name, tensor in model.state_dict().items():
        if name in scales:
            assert tensor.dtype == scales[name].dtype
            assert torch.equal(tensor, scales[name])


def test_a_fresh_model_of_a_quantised_config():
    config = ssmzoo.quantize(build(), "int4", group_size=32).config
    fresh = ssmzoo.build(config)
    assert fresh.layers[1].mixer.x_proj.scheme == Scheme(4, 32, activations="int8")
    assert fresh(tokens(1, 3)).isfinite().all()


def test_gradients_reach_what_is_left():
    model = ssmzoo.quantize(build(("mamba2",)), "int4").train()
    model(tokens(2, 6)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_compiled():
    model = ssmzoo.quantize(build(("mamba", "attention")), "int4")
    ids = tokens(2, 6)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
        torch.testing.assert_close(compiled, model(ids))


def test_only_what_a_pattern_names():
    model = ssmzoo.quantize(build(("mamba",)), {"layers.0.*": {"bits": 4, "group_size": 128}, "*out_proj": "int8"})
    kinds = {name: m.scheme for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert kinds.pop("layers.1.mixer.out_proj") == Scheme(8)
    assert len(kinds) == 4
    assert set(kinds.values()) == {Scheme(4, 128)}
    assert type(model.embedding) is nn.Embedding


@pytest.mark.parametrize("shapes", [((3, 700), (800, 700)), ((600, 20), (40, 20))], ids=["large map", "many rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_on_a_cpu(dtype, shapes, monkeypatch):
    """Large products are summed in float32, whatever PyTorch's libraries do."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    ours = []
    for name in ("ssmzoo.linear.quantized_linear", "ssmkernels.native.products.in_half"):  # or straight to its kernel
        own = pkgutil.resolve_name(name)
        monkeypatch.setattr(name, lambda *a, own=own, **k: ours.append(1) or own(*a, **k))
    expected = (x.double() @ weight.double().T).to(dtype)
    assert torch.equal(linear(x, weight), expected) or (linear(x, weight) != expected).float().mean() < 0.01
    assert len(ours) >= 1
    assert linear(x, nn.Parameter(weight)).requires_grad


@pytest.mark.parametrize(
    ("scheme", "options", "error", "message"),
    [
        ("int5", {}, ValueError, "'int5'"),
        (8, {}, TypeError, "quantisation: `scheme` must be a scheme's name or a mapping; got int"),
        ({}, {}, ValueError, "at least one pattern"),
        ({"*": {"bits": 3}}, {}, ValueError, "`bits` must be 4 or 8; got 3"),
        ({"*": {"group_size": 64}}, {}, ValueError, "each scheme must have `bits`"),
        ({"*": {"bits": 4, "group_size": 40}}, {}, ValueError, "`group_size` must be a multiple of 32; got 40"),
        ({"*": {"bits": 4, "groups": 2}}, {}, TypeError, "groups"),
        ({"*": "int2"}, {}, ValueError, "int2"),
        ({"layers.9.*": "int8"}, {}, ValueError, r"'layers.9.\*' in `scheme` fits no map"),
        ({"embedding": "int8"}, {}, ValueError, "must be the same for embedding and lm_head"),
        ("int8", {"group_size": 64}, ValueError, "`group_size` is of maps in 4 bits"),
        ("int8", {"activations": "int8"}, ValueError, "`activations` is of maps in 4 bits"),
        ("int4", {"activations": "int4"}, ValueError, "`activations` must be None, 'int8' or 'float'; got 'int4'"),
        ("int4", {"group_size": 160}, ValueError, "`group_size` must be at most 128 or a multiple of it beside int8"),
        ({"*": {"bits": 4, "activations": "half"}}, {}, ValueError, "`activations` must be None or 'int8'"),
        ({"*": {"bits": 8, "activations": "int8"}}, {}, ValueError, "`activations` must be None beside weights in 8"),
        ("int4", {"calibrate": [1, 2]}, TypeError, "`calibrate` must be a tensor of token ids"),
        ("int4", {"calibrate": torch.zeros(3).long()}, ValueError, r"`calibrate` must have shape \(b, l\)"),
    ],
)
def test_refusals(scheme, options, error, message):
    model = build()
    with pytest.raises(error, match=message):
        ssmzoo.quantize(model, scheme, **options)
    assert not model.config.quantization
    assert type(model.embedding) is nn.Embedding


def test_further_refusals(tmp_path):
    with pytest.raises(TypeError, match="`model` must be a SequenceModel; got Linear"):
        ssmzoo.quantize(nn.Linear(2, 2), "int8")
    with pytest.raises(ValueError, match="they are on the meta device"):
        ssmzoo.quantize(ssmzoo.build(build().config, device="meta"), "int8")
    model = ssmzoo.quantize(build(), "int8")
    with pytest.raises(ValueError, match="quantised already"):
        ssmzoo.quantize(model, "int8")
    for format in ("transformers", "original"):
        with pytest.raises(ValueError, match="quantization"):
            ssmzoo.save(model, tmp_path / format, format)


def test_the_command(tmp_path, ssmzoo_command):
    model = build(("mamba",), vocab_size=256)
    ssmzoo.save(model, tmp_path / "run")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    run, out, new = str(tmp_path / "run"), str(tmp_path / "four"), tmp_path / "new"
    status, said, _ = ssmzoo_command("quantize", run, "--bits", "4", "--calibrate", str(text), "--out", out)
    assert status == 0
    assert "written to" in said
    assert ssmzoo.build(out).layers[0].mixer.in_proj.scheme == Scheme(4, 64, activations="int8")
    options = ["--bits", "4", "--calibrate", str(text), "--method", "awq", "--out", str(tmp_path / "aware")]
    assert ssmzoo_command("quantize", run, *options)[0] == 0
    assert isinstance(ssmzoo.build(tmp_path / "aware").layers[0].mixer.in_proj, QuantizedLinear)
    for arguments, message in (
        (["--bits", "3"], "--bits"),
        (["--bits", "8", "--calibrate", str(text)], "--calibrate goes with --bits 4; got --bits 8"),
        (["--bits", "4", "--calibrate", str(text), "--method", "awk"], "unknown --method: 'awk'"),
        (["--bits", "4", "--method", "awq"], "--method goes with --calibrate"),
    ):
        status, _, errors = ssmzoo_command(
            "quantize", str(tmp_path / "run"), *arguments, "--out", str(tmp_path / "new")
        )
        assert status == 1
        assert message in errors
        assert not new.exists()
    status, _, errors = ssmzoo_command("quantize", run, "--out", out)
    assert status == 1
    assert out in errors
