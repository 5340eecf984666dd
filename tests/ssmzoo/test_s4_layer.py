"""S4 and S4D as modules: their options, the rate, decoding, training and the models that are made of them."""

import pickle

import pytest
import torch
from lti_layers import build, plain, run

import ssmzoo
from ssmzoo import set_rate
from ssmzoo.mixers.s4 import S4
from ssmzoo.mixers.s4d import S4D
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.optimizer import parameter_groups


@pytest.mark.parametrize("name", ["s4", "s4d"])
@pytest.mark.parametrize("options", [{}, {"channels": 2}, {"bidirectional": True}, {"dt_tie": False}], ids=str)
def test_kernels_are_what_an_impulse_becomes(name, options):
    mixer = plain(build(name, 4, **options).double())
    torch.nn.init.zeros_(mixer.D)
    impulse = torch.zeros(1, 21, 4, dtype=torch.float64)
    impulse[:, 10] = 1
    response = mixer(impulse)[0].mT
    kernel, reverse = mixer.kernels(11)
    torch.testing.assert_close(response[:, 10:], kernel)
    assert (reverse is None) == mixer.causal
    ahead = torch.zeros_like(response[:, :10]) if reverse is None else reverse[:, :10].flip(1)
    torch.testing.assert_close(response[:, :10], ahead)


class TestRate:
    @pytest.mark.parametrize("name", ["s4", "s4d"])
    @pytest.mark.parametrize("dt_tie", [True, False])
    def test_it_resamples_the_time_axis(self, name, dt_tie):
        """A smooth signal, sampled twice as finely and run at half the rate, gives the same outputs in between."""
        mixer = plain(build(name, 4, dt_max=0.01, dt_tie=dt_tie).double())
        torch.nn.init.zeros_(mixer.D)
        time = torch.arange(0, 400, dtype=torch.float64)[None, :, None].expand(1, 400, 4)
        coarse = mixer(torch.sin(time / 40))
        set_rate(mixer, 0.5)
        fine = mixer(torch.sin(torch.arange(0, 800, dtype=torch.float64)[None, :, None].expand(1, 800, 4) / 80))
        assert (fine[:, ::2] - coarse)[:, 50:].abs().max() < 0.03 * coarse.abs().max()
        set_rate(mixer, 1.0)
        assert torch.equal(mixer(torch.sin(time / 40)), coarse)

    def test_it_reaches_decoding_too(self):
        mixer = build("s4d", 4)
        x = torch.randn(1, 9, 4)
        with torch.no_grad():
            for rate in (1.0, 2.0):
                set_rate(mixer, rate)
                torch.testing.assert_close(run(mixer, x, list(range(1, 9)))[0], mixer(x), rtol=1e-5, atol=1e-5)

    def test_every_layer_of_a_model(self):
        model = ssmzoo.build("s4-lm-tiny", d_model=16, n_layers=2)
        set_rate(model, 2)
        assert [block.mixer.rate for block in model.blocks] == [2.0, 2.0]

    @pytest.mark.parametrize("name", ["s4", "s4d"])
    def test_it_is_an_option_too(self, name):
        """The same weights, and a config keeps it."""
        later, x = build(name, 4), torch.randn(1, 9, 4)
        mixer = build(name, 4, rate=2)
        mixer.load_state_dict(later.state_dict())
        set_rate(later, 2.0)
        assert torch.equal(mixer(x), later(x))
        model = ssmzoo.build("s4-lm-tiny", d_model=16, n_layers=1, pattern=[name], mixers={name: {"rate": 0.5}})
        assert ssmzoo.build(model.config).blocks[0].mixer.rate == 0.5

    def test_errors(self):
        for make in (lambda rate: set_rate(build("s4"), rate), lambda rate: ssmzoo.build_mixer("s4d", 4, rate=rate)):
            with pytest.raises(ValueError, match="`rate` must be above 0; got 0"):
                make(0)
        with pytest.raises(ValueError, match="must have an S4, S4D, S5 or Hyena layer; got LSTM without one"):
            set_rate(ssmzoo.build_mixer("lstm", 4), 2.0)


class TestDecoding:
    @pytest.mark.parametrize(("name", "how"), [("s4", "bilinear"), ("s4", "zoh"), ("s4d", "zoh")])
    @pytest.mark.parametrize("weight", ["log_dt", "A_log", "A_imag", "B", "C", "D"])
    def test_a_changed_weight_changes_the_next_token(self, name, how, weight):
        """However it is changed: what decoding keeps from one token to the next never goes stale."""
        mixer, x = build(name, 4, discretization=how), torch.randn(1, 1, 4)
        with torch.no_grad():
            _, state = mixer(x, mixer.initial_state(1))
            mixer(x, state.clone())
            mixer.get_parameter(weight).data.mul_(1.5)
            now, _ = mixer(x, state.clone())
            fresh = build(name, 4, discretization=how)
            fresh.load_state_dict(mixer.state_dict())
            torch.testing.assert_close(now, fresh(x, state.clone())[0], rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["s4", "s4d"])
    def test_it_keeps_the_system_only_without_gradients(self, name):
        mixer, x = build(name, 4), torch.randn(1, 1, 4)
        with torch.no_grad():
            mixer(x, mixer.initial_state(1))
        kept = mixer._kept.value
        assert kept is not None
        y, _ = mixer(x, mixer.initial_state(1))
        y.sum().backward()
        assert mixer.log_dt.grad is not None
        assert mixer._kept.value is kept
        with torch.no_grad():
            mixer(x, mixer.initial_state(1))
        assert mixer._kept.value is kept

    def test_memory_does_not_grow(self):
        mixer = build("s4", 4)
        state = mixer.initial_state(2, max_length=10_000)
        before = state.nbytes
        with torch.no_grad():
            _, state = mixer(torch.randn(2, 1000, 4), state)
        assert state.nbytes == before == 2 * 4 * 4 * 8


class TestTraining:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("name", "init"), [("s4", "legs"), ("s4", "fourier"), ("s4d", "legs"), ("s4d", "real")])
    def test_half_precision_modules_learn(self, name, init, dtype):
        torch.manual_seed(0)
        mixer = build(name, 16, init=init).to(dtype)
        x = torch.randn(4, 32, 16, dtype=dtype)
        target = x.roll(1, dims=1).float()
        target[:, 0] = 0
        optimizer = torch.optim.SGD(mixer.parameters(), lr=2.0)
        losses = []
        for _ in range(30):
            loss = (mixer(x).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(torch.isfinite(p).all() for p in mixer.parameters())
        assert losses[-1] < 0.96 * losses[0]

    @pytest.mark.parametrize(("name", "how"), [("s4", "bilinear"), ("s4", "zoh"), ("s4d", "zoh")])
    def test_states_keep_their_precision_under_autocast(self, name, how):
        mixer, x = plain(build(name, 4, discretization=how)), torch.randn(1, 40, 4)
        with torch.no_grad():
            expected, after = run(mixer, x, [1, 2])
            with torch.autocast("cpu", torch.bfloat16):
                y, state = run(mixer, x, [1, 2])
        assert torch.equal(state.ssm, after.ssm)
        assert torch.equal(y, expected)

    @pytest.mark.parametrize("name", ["s4", "s4d"])
    def test_a_state_with_gradients_compiles(self, name):
        torch._dynamo.reset()
        mixer = build(name, 4).double()
        state = torch.randn_like(mixer.initial_state(2).ssm).requires_grad_()
        x = torch.randn(2, 19, 4, dtype=torch.float64)

        def function(x, ssm):
            y, after = mixer(x, mixer.state_class(ssm))
            return y, after.ssm

        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            y, after = call(x, state)
            loss = y.square().sum() + torch.view_as_real(after).square().sum()
            results.append([y, after, *torch.autograd.grad(loss, [state, *mixer.parameters()])])
        torch.testing.assert_close(*results)

    def test_the_system_has_its_own_rate_and_no_decay(self):
        mixer = build("s4", lr=0.002)
        assert mixer.learning_rates == dict.fromkeys(("A_log", "A_imag", "P", "B", "log_dt"), 0.002)
        assert set(mixer.no_weight_decay) == set(mixer.learning_rates)
        mixer = build("s4d", bidirectional=True, lr={"A": 0.001, "B": None, "C": 0.01})
        assert mixer.learning_rates == {"A_log": 0.001, "A_imag": 0.001, "C": 0.01, "C_reverse": 0.01}
        assert set(mixer.no_weight_decay) == {"A_log", "A_imag", "B", "log_dt"}
        assert build("s4d", lr=None).learning_rates == {}

    def test_a_rate_of_zero_keeps_a_weight(self):
        mixer = build("s4", lr={"A": 0, "dt": 0.001})
        assert [n for n, p in mixer.named_parameters() if not p.requires_grad] == ["A_log", "A_imag", "P"]

    def test_the_trainer_honours_them(self):
        lr = {"A": 0.0005, "B": 0.002}
        model = ssmzoo.build("s4-lm-tiny", d_model=16, n_layers=1, **{"mixers.s4.lr": lr, "mixers.s4.dt_tie": False})
        groups = parameter_groups(model, TrainConfig(lr=0.01, weight_decay=0.1))
        found = {id(p): (g["weight_decay"], g["peak"]) for g in groups for p in g["params"]}
        mixer = model.blocks[0].mixer
        for name in ("A_log", "A_imag", "P"):
            assert found[id(mixer.get_parameter(name))] == (0.0, 0.0005), name
        assert found[id(mixer.B)] == (0.0, 0.002)
        assert found[id(mixer.log_dt)] == (0.0, 0.01)
        assert found[id(mixer.C)] == (0.1, 0.01)
        assert found[id(mixer.D)] == (0.0, 0.01)
        assert found[id(mixer.out_proj.weight)] == (0.1, 0.01)


class TestOptions:
    def test_sizes(self):
        mixer = build("s4", 8, init="legt", n_ssm=2, channels=3, gate=2, bottleneck=2, dt_tie=False)
        shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
        assert shapes == {
            "log_dt": (4, 4),
            "A_log": (2, 4),
            "A_imag": (2, 4),
            "P": (2, 2, 4, 2),
            "B": (2, 4, 2),
            "C": (12, 4, 2),
            "D": (12,),
            "in_proj.weight": (4, 8),
            "in_proj.bias": (4,),
            "gate_in.weight": (8, 8),
            "gate_in.bias": (8,),
            "gate_out.weight": (8, 12),
            "gate_out.bias": (8,),
            "out_proj.weight": (16, 8),
            "out_proj.bias": (16,),
        }

    def test_channels_are_kernels_on_one_state(self):
        """Two channels with the maps of two layers give the outputs of both."""
        both, one, two = (plain(build("s4", 4, channels=c)) for c in (2, 1, 1))
        for i, single in enumerate((one, two)):
            single.load_state_dict(
                both.state_dict()
                | single.state_dict()
                | {"C": both.C[4 * i :][:4], "D": both.D[4 * i :][:4]}
                | {n: both.state_dict()[n] for n in ("log_dt", "A_log", "A_imag", "P", "B")},
                strict=False,
            )
        x = torch.randn(1, 10, 4)
        torch.testing.assert_close(both(x), torch.cat([one(x), two(x)], dim=-1), rtol=1e-4, atol=1e-5)

    def test_a_gate_closes(self):
        mixer = build("s4d", gate=2)
        torch.nn.init.zeros_(mixer.gate_in.weight), torch.nn.init.zeros_(mixer.gate_in.bias)
        y = mixer(torch.randn(1, 5, 8))
        torch.testing.assert_close(y, y[:, :1].expand_as(y))  # the last map's bias alone

    def test_step_sizes_lie_in_their_range(self):
        for tie in (True, False):
            dt = build("s4", 64, dt_min=0.01, dt_max=0.02, dt_tie=tie).log_dt.exp()
            assert dt.min() >= 0.01 * (1 - 1e-5)
            assert dt.max() <= 0.02 * (1 + 1e-5)
            assert dt.std() > 0

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("s4", {"d_state": 5}, "S4: `d_state` must be positive, and even, as pairs; got 5"),
            ("s4d", {"d_state": 5}, "S4D: `d_state` must be positive, and even, as pairs; got 5"),
            ("s4d", {"d_state": 0, "init": "real"}, "`d_state` must be positive; got 0"),
            ("s4d", {"dt_min": 0.2}, "`dt_min` <= `dt_max` must hold"),
            ("s4", {"channels": 0}, "`channels` must be at least 1; got 0"),
            ("s4", {"gate": 0}, "`gate` must be at least 1; got 0"),
            ("s4", {"bottleneck": 3}, "`bottleneck` must divide d_model=8; got 3"),
            ("s4", {"n_ssm": 3}, "`n_ssm` must divide the 8 channels; got 3"),
            ("s4", {"lr": {"AA": 0.1}}, "unknown name in `lr`: 'AA'. Did you mean 'A'"),
            ("s4", {"lr": {"A": -1.0}}, "`lr` of A must be a number >= 0, or None; got -1.0"),
        ],
    )
    def test_bad_values(self, name, options, message):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            build(name, **options)

    @pytest.mark.parametrize("options", [{"init": "lin"}, {"discretization": "dss"}, {"activation": "glu"}])
    def test_bad_names(self, options):
        with pytest.raises(TypeError, match="must be "):
            build("s4", **options)

    def test_bad_names_to_the_class_itself(self):
        with pytest.raises(ValueError, match="unknown init: 'legz'. Did you mean 'leg"):
            S4(8, init="legz")
        with pytest.raises(ValueError, match="unknown init: 'line'. Did you mean 'lin'"):
            S4D(8, init="line")
        with pytest.raises(ValueError, match="unknown activation: 'gel'. Did you mean 'gelu'"):
            S4(8, activation="gel")

    def test_a_module_can_be_pickled(self):
        mixer, x = build("s4"), torch.randn(1, 3, 8)
        assert torch.equal(pickle.loads(pickle.dumps(mixer))(x), mixer(x))

    def test_both_ways_has_no_state(self):
        with pytest.raises(ValueError, match="S4: there is no `initial_state` with `bidirectional=True`"):
            build("s4", bidirectional=True).initial_state(1)


def test_the_models_of_the_long_range_arena():
    sizes = {"listops": (8, 128), "imdb": (6, 256), "aan": (6, 256), "cifar": (6, 512), "pathfinder": (6, 256)}
    for task, size in (sizes | {"pathx": (6, 256)}).items():
        model = ssmzoo.build(f"lra-{task}", device="meta")
        assert (len(model.blocks), model.config.d_model) == size
        assert not model.blocks[0].mixer.causal
        TrainConfig.of(model.config.train)
