"""A token through all layers in one native call: the same as layer by layer, whatever has changed meanwhile."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref

import pytest
import torch
from decoding_models import DELTA, GLA_OPTIONS, MODELS, ROUNDED, SMALL, build, by_layers, decoded, same
from torch.utils.flop_counter import FlopCounterMode

import ssmkernels
import ssmzoo
from ssmkernels import native
from ssmkernels.native.calls import Calls
from ssmkernels.native.prepared import Program, prepare
from ssmzoo.mixers.gla import GLA
from ssmzoo.norm import RMSNorm

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the native CPU library")


@pytest.fixture
def programs(monkeypatch):
    """Counts programs' runs."""
    runs = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda self: (runs.append(self), run(self)))
    return runs


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_bits_as_layer_by_layer(kind, dtype, wide, programs):
    model = build(kind, residual_in_fp32=wide).to(dtype)
    state = model.initial_state(2)
    ids = torch.tensor([[1], [2]])
    with torch.no_grad():
        for t in range(4):
            expected = by_layers(model, (ids + t) % 20, state.clone())
            logits, state = model((ids + t) % 20, state)
            assert same((logits, state), expected)
    assert len(programs) == 4  # from the first token on


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("kind", ["gla", "retnet", "mamba2_mlp", "mamba_mlp", "attention", "attention_window"])
def test_half_precision_is_no_further_off_than_layer_by_layer(kind, wide, programs):
    """Measured from a model with the same weights in float32."""
    model = build(kind, residual_in_fp32=wide).bfloat16()
    truth = copy.deepcopy(model).float()
    state, true_state = model.initial_state(2), truth.initial_state(2)
    ids, own, layers = torch.tensor([[1], [2]]), [], []
    with torch.no_grad():
        for t in range(4):
            expected, _ = by_layers(model, (ids + t) % 20, state.clone())
            logits, state = model((ids + t) % 20, state)
            exact, true_state = truth((ids + t) % 20, true_state)
            own.append(logits - exact)
            layers.append(expected - exact)
    assert len(programs) == 4 * 2  # both models'
    assert torch.stack(own).norm() <= 1.5 * torch.stack(layers).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [*MODELS, *ROUNDED])
def test_a_models_first_token_is_as_later_ones(kind, dtype):
    """A fault: it was computed by the layers, which round elsewhere, and the same text went on otherwise later."""
    model = build(kind).to(dtype)
    state = model.initial_state(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        found = []
        for _ in range(3):
            after = state.clone()
            for t in range(3):
                logits, after = model(torch.tensor([[t], [t + 1]]), after)
            found.append((logits, after))
    assert all(same(each, found[0]) for each in found[1:])


@pytest.mark.parametrize("kind", ROUNDED)
def test_mlps_and_layers_of_several_calls_are_the_same_to_rounding(kind, programs):
    for dtype in (torch.float32, torch.float64):
        model = build(kind).to(dtype)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))  # no bias may be 0, nor a norm's weight 1
            state = model.initial_state(2)
            for t in range(4):
                ids = torch.tensor([[1], [2]]) + t
                expected = by_layers(model, ids, state.clone())
                logits, state = model(ids, state)
                assert same((logits, state), expected, 40 * torch.finfo(dtype).eps)
    assert len(programs) == 8


def new_data(model, state):
    model.layers[1].mixer.in_proj.weight.data = model.layers[1].mixer.in_proj.weight.data * 2


def new_data_of_a_norm(model, state):
    weight = model.layers[1].norm.weight
    weight.data = torch.arange(16.0)


def in_place(model, state):
    model.layers[1].mixer.out_proj.weight.data.mul_(2)


def new_parameters(model, state):
    weights = {name: 1.5 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)


def another_eps(model, state):
    model.layers[2].norm.eps = 0.5


def another_option(model, state):
    model.layers[0].mixer.dt_limit = (0.0, 0.01)


def another_mixer(model, state):
    model.layers[1].mixer = copy.deepcopy(model.layers[2].mixer)


def another_norm(model, state):
    norm = model.layers[1].norm
    model.layers[1].norm = torch.nn.Sequential(RMSNorm(16), torch.nn.Tanh())
    model.layers[1].norm.weight = norm.weight


def a_multiplier(model, state):
    model.layers[1].multiplier = 0.5


def a_hook(model, state):
    model.layers[1].mixer.out_proj.register_forward_hook(lambda module, args, y: 2 * y)


def a_replaced_forward(model, state):
    forward = model.layers[1].mixer.forward
    model.layers[1].mixer.forward = lambda x, *args, **kwargs: forward(2 * x, *args, **kwargs)


def a_parametrisation(model, state):
    torch.nn.utils.parametrizations.weight_norm(model.layers[1].mixer.in_proj)


def a_bias(model, state):
    model.layers[1].mixer.in_proj.bias = torch.nn.Parameter(torch.ones(model.layers[1].mixer.in_proj.out_features))


def another_state(model, state):
    state.layers[1].ssm = state.layers[1].ssm + 1


CHANGES = [
    new_data, new_data_of_a_norm, in_place, new_parameters, another_eps, another_option, another_mixer, another_norm,
    a_multiplier, a_hook, a_replaced_forward, a_parametrisation, a_bias, another_state,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_two_tokens_take_effect(change, programs):
    model = build()
    state = decoded(model, model.initial_state(1))[1]
    assert programs
    before = decoded(copy.deepcopy(model), state.clone(), 1)[0]
    change(model, state)
    after = decoded(model, state)[0]
    assert not torch.equal(before[0], after[0])


def doubled(forward, named):
    """A ``forward`` of twice the result, as it is written by hand, or by a decorator that keeps the name."""

    def twice(self, *args, **kwargs):
        return 2 * forward(self, *args, **kwargs)

    return functools.wraps(forward)(twice) if named else twice


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["between two tokens", "before the first"])
@pytest.mark.parametrize("place", ["mixer.out_proj", "norm"])
def test_a_forward_that_was_replaced_in_the_class_is_called(place, first, named, programs, monkeypatch):
    """A fault: programs of native calls went past it, and so did what computes maps from their weights."""
    model = build()
    kind = type(model.get_submodule(f"layers.1.{place}"))
    state = model.initial_state(1) if first else decoded(model, model.initial_state(1))[1]
    assert bool(programs) != first
    monkeypatch.setattr(kind, "forward", doubled(kind.forward, named))
    found = decoded(model, state.clone())[0]
    for module in model.modules():  # with a hook in each, which nobody goes past
        module.register_forward_hook(lambda module, args, y: None)
    then = decoded(model, state)[0]
    torch.testing.assert_close(found, then)


def doubled_mix(mix):
    def twice(*args, **kwargs):
        y, state = mix(*args, **kwargs)
        return 2 * y, state

    return twice


@pytest.mark.parametrize("first", [False, True], ids=["between two tokens", "before the first"])
@pytest.mark.parametrize("place", ["class", "instance"])
@pytest.mark.parametrize("name", sorted({"mamba", "mamba2", "gated_deltanet", *ROUNDED}))
def test_a_mix_that_was_replaced_is_called(name, place, first, programs, monkeypatch):
    """A fault: programs of native calls went past it."""
    model = build(name)
    state = model.initial_state(1) if first else decoded(model, model.initial_state(1), tolerance=1e-5)[1]
    assert bool(programs) != first
    mixer = model.blocks[1].mixer
    owner = type(mixer) if place == "class" else mixer
    monkeypatch.setattr(owner, "mix", doubled_mix(owner.mix))
    found = decoded(model, state.clone(), tolerance=1e-5)[0]
    for module in model.modules():  # with a hook in each, which nobody goes past
        module.register_forward_hook(lambda module, args, y: None)
    then = decoded(model, state)[0]
    torch.testing.assert_close(found, then)


METHODS = {"attention": ["_over_keys", "_project"], "gla": ["log_decay", "_read"], "mamba": ["_step"]}


@pytest.mark.parametrize("first", [False, True], ids=["between two tokens", "before the first"])
@pytest.mark.parametrize(("name", "method"), [(name, m) for name, found in METHODS.items() for m in found])
def test_a_method_that_was_replaced_in_a_mixer_is_called(name, method, first, programs):
    """A fault: programs of native calls went past it."""
    model = build(name)
    state = model.initial_state(1) if first else decoded(model, model.initial_state(1), tolerance=1e-5)[1]
    mixer, count, asked = model.blocks[1].mixer, len(programs), []
    own = getattr(mixer, method)
    setattr(mixer, method, lambda *args, **kwargs: (asked.append(method), own(*args, **kwargs))[1])
    decoded(model, state, tolerance=1e-5)
    assert len(asked) == 2 * 3  # with native calls and without
    assert len(programs) == count


def a_call_of_a_subclass(model, state):
    class Doubled(GLA):
        def __call__(self, *args, **kwargs):
            y, state = super().__call__(*args, **kwargs)
            return 2 * y, state

    model.layers[0].mixer.__class__ = Doubled


def another_activation(model, state):
    model.layers[0].mlp.f = torch.relu


def a_hook_on_a_map(model, state):
    model.layers[2].mlp.fc2.register_forward_hook(lambda module, args, y: 2 * y)


def a_multiplier_of_an_mlp(model, state):
    model.layers[1].mlp.gate_multiplier = 3.0


def options_in_place(model, state):
    model.layers[0].mixer.options.feature_map = "relu"


def a_method_of_a_subclass(model, state):
    class Faster(GLA):
        def log_decay(self, x):
            return 2 * super().log_decay(x)

    model.layers[0].mixer.__class__ = Faster


def a_map_of_another_kind(model, state):
    model.layers[0].mlp.fc1 = torch.nn.Sequential(model.layers[0].mlp.fc1, torch.nn.Tanh())


def a_map_with_calls_of_its_own(model, state):
    class Tripled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

        def prepare_step(self, calls, x):
            return calls.activated(calls.linear(x, self.weight), "identity", scale=3.0)

    mlp = model.layers[0].mlp
    weight, mlp.fc1 = mlp.fc1.weight, Tripled(16, mlp.fc1.out_features, bias=False)
    mlp.fc1.weight = weight


@pytest.mark.parametrize(
    ("change", "still"),
    [
        (another_activation, False),
        (a_hook_on_a_map, False),
        (a_multiplier_of_an_mlp, False),
        (options_in_place, True),
        (a_method_of_a_subclass, False),
        (a_call_of_a_subclass, False),
        (a_map_of_another_kind, False),
        (a_map_with_calls_of_its_own, True),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_changes_of_layers_of_several_calls_take_effect(change, still, programs):
    """``still``: whether the changed model's tokens are native calls again."""
    model, close = build("gla"), 1e-5
    state = decoded(model, model.initial_state(1), 3, close)[1]
    before, count = decoded(copy.deepcopy(model), state.clone(), 1, close)[0], len(programs)
    change(model, state)
    after = decoded(model, state, 4, close)[0]
    assert (before[0] - after[0]).abs().max() > 1e-4
    assert (len(programs) > count) == still


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_state_in_another_layout_is_read_rightly(kind, programs):
    model = build(kind)
    state = decoded(model, model.initial_state(2))[1]
    for layer in state.layers:
        layer.ssm, layer.conv = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (layer.ssm, layer.conv))
    decoded(model, state)


@pytest.mark.parametrize("place", ["layers.1.norm.weight", "layers.1.mixer.D", "layers.1.mixer.conv1d.bias"])
@pytest.mark.parametrize("buffer", [False, True], ids=["attribute", "buffer"])
def test_a_tensor_in_a_weights_place_may_change(place, buffer, programs):
    model = build()
    module, name = model.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
    weight = getattr(module, name).detach()
    delattr(module, name)
    module.register_buffer(name, weight) if buffer else setattr(module, name, weight)
    state = decoded(model, model.initial_state(1))[1]
    before = decoded(model, state.clone(), 1)[0]
    setattr(module, name, weight + 1)
    assert not torch.equal(before[0], decoded(model, state)[0][0])


def test_inference_mode_may_begin_and_end(programs):
    model = build()
    state = decoded(model, model.initial_state(1))[1]
    for _ in range(2):
        with torch.inference_mode():
            copied = decoded(model, state.clone())[1]
        decoded(model, copied.clone())
    assert len(programs) == 15


@pytest.mark.parametrize("kind", ["rwkv7", "mamba3", "kda"])
@torch.no_grad()
def test_a_state_from_inference_mode_goes_on_outside_of_it(kind):
    model, ids = build(kind), torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        state = model(ids, model.initial_state(1))[1]
    for id in (4, 5, 6):
        ids = torch.cat([ids, torch.tensor([[id]])], dim=1)
        logits, state = model(ids[:, -1:], state)
    torch.testing.assert_close(logits[0, -1], model(ids)[0, -1])


def test_what_sees_the_calls_gets_them(programs):
    model = build()
    state = decoded(model, model.initial_state(1))[1]
    count, ids = len(programs), torch.tensor([[1]])
    with torch.no_grad(), ssmkernels.use("reference"):
        model(ids, state.clone())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, state)
    assert counter.get_total_flops() > 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, state)
    logits, _ = model(ids, state)
    assert logits.requires_grad
    assert len(programs) == count


def test_layers_with_more_in_them_are_called(programs):
    gated = {"kind": "swiglu", "gate_multiplier": 2.0}
    for changes in ({"mlp": {"kind": "gelu"}}, {"mlp": gated}, {"norm": "centred_rms"}, {"norm_placement": "post"}):
        model = build(**changes)
        decoded(model, model.initial_state(1))
    for kind in ("mamba3", "kda", "mlstm", "rwkv7"):
        model = build(kind).bfloat16()
        decoded(model, model.initial_state(1))
    for kind, options in (("deltanet", DELTA | {"qk_norm": "sum"}), ("gla", GLA_OPTIONS | {"n_kv_heads": 1})):
        model = build(kind, mixers={kind: options})
        decoded(model, model.initial_state(1))
    model = build()
    decoded(model, model.initial_state(native.FEW + 1))  # more sequences than the native step takes
    assert not programs


def test_a_wrapper_around_a_mixer_is_called(programs):
    class Wrapper(torch.nn.Module):
        def __init__(self, mixer):
            super().__init__()
            self.mixer = mixer

        def forward(self, *args, **kwargs):
            return self.mixer(*args, **kwargs)

    model = build()
    states = [model.initial_state(1) for _ in range(2)]
    model.layers[1].mixer = Wrapper(model.layers[1].mixer)
    decoded(model, states[0])
    model.layers[1].mixer = torch.compile(model.layers[1].mixer.mixer, backend="eager")
    decoded(model, states[1])
    model = build()
    model.layers[1].mixer.out_proj = torch.jit.trace(model.layers[1].mixer.out_proj, torch.zeros(1, 1, 32))
    decoded(model, model.initial_state(1))
    assert not programs


def test_several_threads():
    """Each with its own state; one token at a time goes through the prepared calls, and the others layer by layer."""
    model = build()
    states = [model.initial_state(1) for _ in range(4)]
    expected = [decoded(model, state.clone(), 15)[0] for state in states]
    found = [None] * 4

    def work(i):
        state, logits = states[i], []
        with torch.no_grad():
            for t in range(15):
                out, state = model(torch.tensor([[t + 1]]), state)
                logits.append(out)
        found[i] = logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for i in range(4) for a, b in zip(found[i], expected[i], strict=True))


def test_a_call_that_would_copy_an_argument_is_not_prepared():
    x, weight = torch.randn(2, 8), torch.ones(8)
    with torch.no_grad():
        call = prepare(ssmkernels.rms_norm, x, weight)
        assert torch.equal(call.run(), ssmkernels.rms_norm(x, weight))
        assert prepare(ssmkernels.rms_norm, torch.randn(8, 2).t(), weight) is None
        assert prepare(ssmkernels.rms_norm, x, weight, residual=torch.randn(8, 2).t()) is None
        assert prepare(ssmkernels.rms_norm, x, weight, implementation="reference") is None
        with pytest.raises(ValueError, match="`weight`"):
            prepare(ssmkernels.rms_norm, x, torch.ones(7))


def small(name, **options):
    torch.manual_seed(0)
    return ssmzoo.build(ssmzoo.ModelConfig(**SMALL | {**MODELS, **ROUNDED}[name] | options)).eval()


@pytest.mark.parametrize("name", [*MODELS, *ROUNDED])
def test_a_program_goes_from_state_to_state(name, monkeypatch):
    made = []
    init = Program.__init__
    monkeypatch.setattr(Program, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1])
    model, ids = small(name), torch.randint(20, (6, 3, 1))

    def run(order, count):
        """Outputs, where token t goes to the state of number order(t) of those of 2 and of 3 sequences, in turns."""
        states = [model.initial_state(2 + i % 2) for i in range(count)]
        outputs = []
        for t in range(len(ids) * count):
            i = order(t)
            x = ids[t // count][: 2 + i % 2]
            y, states[i] = model(x, states[i])
            outputs.append((i, t // count, y))
        return sorted(outputs, key=lambda each: each[:2])

    with torch.no_grad():
        apart = run(lambda t: t % 4, 4)
        count, made[:] = len(made), []
        again = run(lambda t: 3 - t % 4, 4)
    assert count <= 2 + 2  # one for each shape, and the first token of each may come before
    assert not made  # other states of these shapes, and no program more
    for one, other in zip(apart[4:], again[4:], strict=True):  # the very first token is read layer by layer
        torch.testing.assert_close(one[2], other[2], rtol=1e-5, atol=1e-5)


def test_programs_keep_no_states_alive():
    model, refs = small("mamba"), []
    with torch.no_grad():
        for rows in (1, 2, 3, 2, 1):
            state = model.initial_state(rows)
            for _ in range(3):
                _, state = model(torch.ones(rows, 1, dtype=torch.long), state)
            refs.append([weakref.ref(t) for t in state.tensors()])
            del state, _
    gc.collect()
    assert not any(ref() is not None for each in refs for ref in each)


def test_threads_have_programs_of_their_own():
    """States of the same shape, a token of each in turns by two threads while the model stays as it is."""
    model, ids = small("mamba"), torch.randint(20, (40, 1, 1))
    results = {}

    def answer(number):
        with torch.no_grad():
            state, out = model.initial_state(1), []
            for token in ids[number:]:
                y, state = model(token, state)
                out.append(y)
            results[number] = torch.cat(out)

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, got in dict(results).items():
        answer(number)
        torch.testing.assert_close(got, results[number], rtol=1e-6, atol=1e-6)


def test_a_call_that_hides_where_a_state_lies_is_not_moved():
    """An address within a state that no tensor of the call begins at: nobody can tell what else was made of it."""
    state = torch.zeros(4, 8)
    calls = Calls()
    calls.activated(state, "identity")
    assert Program(calls.made, [state]).move([torch.ones(4, 8)])
    hidden = [calls.made[0]._replace(values={**calls.made[0].values, "x": state[1].data_ptr()})]
    assert not Program(hidden, [state]).move([torch.ones(4, 8)])
    assert not Program(calls.made, [state, torch.zeros(3)]).move([torch.ones(4, 8), torch.zeros(3)])
