"""The one model: properties over random hybrids, padding, heads, precision, initialisation, errors."""

import math
import random

import pytest
import torch

import ssmzoo

TINY = {
    "d_model": 16,
    "n_layers": 2,
    "pattern": ["mamba", "attention"],
    "mixers": {"attention": {"head_dim": 8}},
    "vocab_size": 11,
}

ENTRIES = {
    "mamba": {"d_state": 3},
    "s4d": {"d_state": 4},
    "attention": {"head_dim": 8, "n_kv_heads": 1},
    "local": {"kind": "attention", "head_dim": 8, "window": 3},
    "shared": {"kind": "attention", "head_dim": 8, "shared": True},
    "gru": {},
    "both": {"kind": "parallel", "branches": ["mamba", "local"]},
}


def random_model(seed):
    """A hybrid drawn at random, in float64."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    pattern = draw.choices(list(ENTRIES), k=draw.randint(1, 4))
    used = {*pattern, *(("mamba", "local") if "both" in pattern else ())}
    config = {
        "d_model": 16,
        "n_layers": draw.randint(2, 5),
        "pattern": pattern,
        "mixers": {name: ENTRIES[name] for name in used},
        "mlp": {"kind": draw.choice(["swiglu", "gelu", "none"])},
        "norm": draw.choice(["rms", "layer"]),
        "vocab_size": 11,
        "pad_vocab_size_multiple": draw.choice([1, 8]),
        "tie_embeddings": draw.choice([True, False]),
        "residual_in_fp32": draw.choice([True, False]),
    }
    return ssmzoo.build(config).double().eval()


def ids_like(*shape, seed=0):
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("seed", range(8))
class TestRandomModels:
    @torch.no_grad()
    def test_step_by_step_is_at_once(self, seed):
        model, ids = random_model(seed), ids_like(2, 9)
        state, steps = model.initial_state(2), []
        for t in range(9):
            logits, state = model(ids[:, t : t + 1], state)
            steps.append(logits)
        close(torch.cat(steps, 1), model(ids))

    @torch.no_grad()
    def test_cut_anywhere_is_whole(self, seed):
        model, ids = random_model(seed), ids_like(2, 12)
        state, pieces = model.initial_state(2, max_length=12), []
        for piece in ids.tensor_split((3, 3, 4, 10), dim=1):
            logits, state = model(piece, state)
            pieces.append(logits)
        close(torch.cat(pieces, 1), model(ids))

    @torch.no_grad()
    def test_packed_and_padded_are_one_by_one(self, seed):
        model = random_model(seed)
        lengths = (4, 1, 0, 7)
        alone = [ids_like(1, n, seed=n) for n in lengths]
        expected = [model(ids) for ids in alone]
        borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        close(model(torch.cat(alone, 1), cu_seqlens=borders), torch.cat(expected, 1))
        for left in (True, False):
            padded, mask = torch.zeros(4, 7, dtype=torch.long), torch.zeros(4, 7, dtype=torch.bool)
            for i, ids in enumerate(alone):
                place = slice(7 - lengths[i], 7) if left else slice(0, lengths[i])
                padded[i, place], mask[i, place] = ids[0], True
            logits = model(padded, mask=mask)
            for i, want in enumerate(expected):
                close(logits[i][mask[i]], want[0])
            assert (logits[~mask] == 0).all()

    @torch.no_grad()
    def test_the_last_tokens_alone(self, seed):
        model, ids = random_model(seed), ids_like(3, 6)
        mask = torch.ones(3, 6, dtype=torch.bool)
        mask[0, :4], mask[2, 5:] = False, False
        close(model(ids, last_only=True), model(ids)[:, -1:])
        logits = model(ids, mask=mask)
        close(model(ids, mask=mask, last_only=True)[:, 0], logits[[0, 1, 2], [5, 5, 4]])
        with pytest.raises(ValueError, match="`last_only` needs at least one token in every sequence"):
            model(ids[:, :0], last_only=True)

    @torch.no_grad()
    def test_decoding_after_a_padded_prefill(self, seed):
        model = random_model(seed)
        ids, mask = ids_like(3, 6), torch.ones(3, 6, dtype=torch.bool)
        mask[0, :4], mask[2, 5:] = False, False
        more = ids_like(3, 4, seed=1)
        _, state = model(ids, model.initial_state(3), mask=mask)
        outputs = []
        for t in range(4):
            logits, state = model(more[:, t : t + 1], state)
            outputs.append(logits)
        for i in range(3):
            close(torch.cat(outputs, 1)[i], model(torch.cat([ids[i][mask[i]], more[i]])[None])[0, -4:])

    @torch.no_grad()
    def test_the_future_changes_nothing(self, seed):
        model, ids = random_model(seed), ids_like(2, 10)
        changed = ids.clone()
        changed[:, 6:] = (changed[:, 6:] + 1) % 11
        close(model(changed)[:, :6], model(ids)[:, :6])

    @torch.no_grad()
    def test_states_branch(self, seed):
        model, ids = random_model(seed), ids_like(2, 8)
        _, state = model(ids[:, :5], model.initial_state(2))
        beams = state.select([1, 1, 0])
        again, _ = model(ids[[1, 1, 0], 5:], beams)
        close(again, model(ids)[[1, 1, 0], 5:])
        assert state.nbytes > 0
        assert all(t.device.type == "cpu" for t in state.to("cpu").tensors())

    def test_gradients_reach_every_parameter(self, seed):
        model = random_model(seed)
        model(ids_like(2, 9)).logsumexp(-1).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name

    def test_the_config_gives_it_back(self, seed):
        model = random_model(seed)
        again = ssmzoo.build(model.config).double().eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(ids_like(2, 5)), model(ids_like(2, 5)))


class TestHeads:
    def test_vocabulary_padding(self):
        model = ssmzoo.build(TINY, pad_vocab_size_multiple=8)
        assert model(ids_like(1, 3)).shape == (1, 3, 16)

    def test_tied_embeddings_are_one_tensor(self):
        tied, untied = ssmzoo.build(TINY), ssmzoo.build(TINY, tie_embeddings=False)
        assert tied.lm_head.weight is tied.embedding.weight
        assert untied.num_parameters() == tied.num_parameters() + 11 * 16

    @pytest.mark.parametrize("pooling", ["mean", "last"])
    @torch.no_grad()
    def test_classes(self, pooling):
        config = {"d_model": 16, "n_layers": 2, "pattern": ["s4d"], "d_input": 2, "n_classes": 3, "pooling": pooling}
        model = ssmzoo.build(config).double().eval()
        x = torch.randn(3, 7, 2, dtype=torch.float64)
        whole = model(x)
        assert whole.shape == (3, 3)
        mask = torch.ones(3, 7, dtype=torch.bool)
        mask[1, :3], mask[2, 2:] = False, False
        close(model(x, mask=mask), torch.cat([model(x[:1]), model(x[1:2, 3:]), model(x[2:, :2])]))
        state = model.initial_state(3)
        for t in range(7):
            logits, state = model(x[:, t : t + 1], state)
        close(logits, whole)

    @torch.no_grad()
    def test_bidirectional(self):
        model = ssmzoo.build({**TINY, "pattern": ["attention", "lstm"]}, bidirectional=True).eval()
        ids = ids_like(1, 5)
        changed = ids.clone()
        changed[0, -1] = (changed[0, -1] + 1) % 11
        assert not torch.allclose(model(ids)[:, 0], model(changed)[:, 0])
        with pytest.raises(ValueError, match="sees the whole sequence at once"):
            model(ids, ssmzoo.build({**TINY, "pattern": ["attention", "lstm"]}).initial_state(1))

    def test_shared_weights_count_once(self):
        config = {**TINY, "n_layers": 4, "mixers": {"attention": {"head_dim": 8, "shared": True}}}
        model = ssmzoo.build(config)
        assert model.layers[1].mixer is model.layers[3].mixer
        assert model.layers[0].mixer is not model.layers[2].mixer


class TestPrecision:
    @pytest.mark.parametrize(
        "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float().half()]
    )
    def test_weights_that_stay_float32(self, move):
        model = ssmzoo.build(TINY)
        kept = model.layers[0].mixer.A_log.detach().clone()
        model = move(model)
        mixer = model.layers[0].mixer
        for parameter in (mixer.A_log, mixer.D, mixer.dt_proj.bias):
            assert parameter.dtype == torch.float32
        assert torch.equal(mixer.A_log, kept)
        assert mixer.in_proj.weight.dtype in (torch.bfloat16, torch.float16)

    def test_built_in_half(self):
        model = ssmzoo.build(TINY, dtype=torch.bfloat16)
        assert model.layers[0].mixer.dt_proj.bias.dtype == torch.float32
        assert model(ids_like(1, 4)).dtype == torch.bfloat16

    @torch.no_grad()
    def test_residual_in_fp32_is_closer_to_the_truth(self):
        torch.manual_seed(0)
        ids = ids_like(4, 20)
        errors = []
        for wide in (True, False):
            torch.manual_seed(0)
            model = ssmzoo.build(TINY, n_layers=12, residual_in_fp32=wide).bfloat16()
            exact = ssmzoo.build(model.config)
            exact.load_state_dict(model.state_dict())
            errors.append((model(ids).double() - exact.double()(ids)).abs().mean())
        assert errors[0] < errors[1]

    def test_autocast(self):
        torch.manual_seed(0)
        model, ids = ssmzoo.build(TINY), ids_like(2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
        torch.testing.assert_close(logits.float(), model(ids), atol=0.05, rtol=0.05)


class TestInitialisation:
    def test_published_start(self):
        torch.manual_seed(0)
        model = ssmzoo.build("mamba-hybrid-tiny", vocab_size=4096, n_layers=8, mlp={"bias": True})
        mixer = model.layers[0].mixer
        assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
        bound = 1 / math.sqrt(256) / math.sqrt(16)  # Kaiming-uniform (√5) of 256 inputs; 16 residuals
        assert mixer.out_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        bound = 1 / math.sqrt(384) / math.sqrt(16)
        assert model.layers[0].mlp.fc2.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert (model.layers[0].mlp.fc1.bias == 0).all()
        assert (mixer.dt_proj.bias != 0).all()
        dt = torch.nn.functional.softplus(mixer.dt_proj.bias)
        assert dt.min() >= 0.001 * 0.999
        assert dt.max() <= 0.1 * 1.001
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(256, 16))
        assert (mixer.D == 1).all()

    def test_a_shared_mixer_is_scaled_once(self):
        torch.manual_seed(0)
        config = {
            "d_model": 64,
            "n_layers": 4,
            "pattern": ["mamba"],
            "mixers": {"mamba": {"shared": True}},
            "vocab_size": 11,
        }
        weight = ssmzoo.build(config).layers[3].mixer.out_proj.weight
        assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(128) / 2, rel=0.02)


class TestErrors:
    model = ssmzoo.build(TINY)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.zeros(1, 2), "must be token ids, int64 or int32; got torch.float32"),
            ([1, 2], r"`inputs` must be a tensor \(b, l\); got list"),
        ],
    )
    def test_types(self, ids, message):
        with pytest.raises(TypeError, match=message):
            self.model(ids)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.zeros(2, dtype=torch.long), r"must have shape \(b, l\); got \(2,\)"),
            (torch.tensor([[0, 11]]), "must hold ids from 0 to 10; got 0 to 11"),
            (torch.tensor([[-1, 1]]), "must hold ids from 0 to 10; got -1 to 1"),
            (torch.zeros(1, 2, dtype=torch.long, device="meta"), "must be on cpu, where the weights are; got meta"),
        ],
    )
    def test_values(self, ids, message):
        with pytest.raises(ValueError, match=message):
            self.model(ids)

    def test_masks(self):
        ids = ids_like(2, 3)
        with pytest.raises(TypeError, match="`mask` must be a bool tensor"):
            self.model(ids, mask=torch.ones(2, 3))
        with pytest.raises(ValueError, match=r"`mask` must have shape \(2, 3\)"):
            self.model(ids, mask=torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="got both"):
            self.model(ids, mask=torch.ones(2, 3, dtype=torch.bool), cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))

    def test_states(self):
        ids = ids_like(2, 3)
        with pytest.raises(ValueError, match="`state` must have 2 sequences, as `inputs`; got 3"):
            self.model(ids, self.model.initial_state(3))
        with pytest.raises(ValueError, match="`state` must have 2 layers; got 3"):
            self.model(ids, ssmzoo.build(TINY, n_layers=3).initial_state(2))
        with pytest.raises(TypeError, match="must come from initial_state"):
            self.model(ids, self.model.initial_state(2).layers[0])

    def test_packing_wants_int32(self):
        with pytest.raises(TypeError, match="`cu_seqlens` must be an int32 tensor; got torch.int64"):
            self.model(ids_like(1, 3), cu_seqlens=torch.tensor([0, 3]))

    def test_features_of_another_width(self):
        model = ssmzoo.build("s4d-classifier", d_model=16, n_layers=1)
        with pytest.raises(ValueError, match=r"must have shape \(b, l, d_input=1\); got \(2, 5, 3\)"):
            model(torch.randn(2, 5, 3))
