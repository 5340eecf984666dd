from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssmkernels import native, quantized_linear, use
from ssmkernels.core.validate import HALF
from ssmkernels.native import products
from ssmkernels.native.eager import finite_exp
from ssmkernels.native.products import LARGE, WORK_WITH_GRADIENTS, among_others, linear, matmul
from ssmkernels.ops.quantized_linear.cpu import FEW as FEW_IN_HALF
from ssmzoo.linear import Linear, WideBiasLinear
from ssmzoo.linear import linear as linear_of_any_dtype

EVERY_SET = frozenset(isa for known in native.sources.ISAS.values() for isa in known)
OUT, IN = 1024, 640  # large enough
FEW = native.FEW
NATIVE = native.missing() is None
NEEDS_NATIVE = pytest.mark.skipif(not NATIVE, reason="needs the native library")


@pytest.fixture
def calls(monkeypatch):
    """The names of the native kernels that are run, and "onednn", one by one."""
    if not products._available():
        pytest.skip("needs a PyTorch with oneDNN")
    made = []
    run, product = native.run, torch.ops.mkldnn._linear_pointwise

    class Counting:
        @staticmethod
        def _linear_pointwise(*args):
            made.append("onednn")
            return product(*args)

    monkeypatch.setattr(native, "run", lambda name, values: made.append(name) or run(name, values))
    monkeypatch.setattr(torch.ops, "mkldnn", Counting)
    return made


@pytest.fixture
def every_set(monkeypatch):
    """The native product of several rows on this machine's instruction set, whichever that is."""
    monkeypatch.setattr(products, "MATMUL", EVERY_SET)


@torch.no_grad()
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(IN,), (1, IN), (1, 1, IN), (3, 5, IN), (2, 0, IN), (2, 3, 4, IN), (70, IN), (FEW, 1, IN), (FEW + 1, 1, IN)],
    ids=str,
)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torchs_product(shape, bias, measured, calls, monkeypatch):
    monkeypatch.setattr(products, "MATMUL", EVERY_SET if measured else frozenset())
    torch.manual_seed(0)
    module, x = Linear(IN, OUT, bias=bias), torch.randn(shape)
    found, expected = module(x), F.linear(x, module.weight, module.bias)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if 0 in shape:
        assert not calls
    elif NATIVE and (x.numel() == IN or (x.shape[-2] == 1 and len(x) <= FEW)):
        assert calls == ["product"]
    else:
        assert calls == ["matmul" if measured and NATIVE else "onednn"]


@NEEDS_NATIVE
@torch.no_grad()
@pytest.mark.parametrize("size", [5, 31, 32, 640, 768, 769, 800, 1536, 1543, 2400])
@pytest.mark.parametrize("bias", [True, False])
def test_a_token_of_each_sequence_gets_the_bits_that_it_gets_alone(size, bias, calls):
    """Of sizes with and without a rest beyond whole steps and stretches; the outputs are no multiple of four."""
    torch.manual_seed(0)
    x, weight = torch.randn(FEW, 1, size), torch.randn(LARGE // size + 3, size) / size**0.5
    own = torch.randn(len(weight)) if bias else None
    alone = torch.cat([linear(row, weight, own) for row in x])[:, None]
    torch.testing.assert_close(alone, F.linear(x, weight, own), rtol=1e-5, atol=1e-5)
    for rows in (2, 3, 4, 5, 6, 7, 13, 16, 17, FEW):
        assert torch.equal(linear(x[:rows], weight, own), alone[:rows])
    assert {*calls} == {"product"}


@NEEDS_NATIVE
@torch.no_grad()
@pytest.mark.parametrize(("outputs", "size"), [(LARGE, 1), (1, LARGE), (1001, 525), (50280, 768)], ids=str)
def test_one_row_gives_the_same_bits_on_any_threads(outputs, size, calls):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 2 * size)[:, ::2], torch.randn(outputs, size), torch.randn(outputs)
    found = on_threads(lambda: linear(x, weight, bias))
    assert calls == ["product"] * 3
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * size**0.5)


def on_threads(call):
    """The result of one thread; two and three give the same bits."""
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(call())
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    return found[0]


def layouts(rows, columns, dtype):
    """Matrices of a shape: contiguous, transposed, with gaps, expanded."""
    yield torch.randn(rows, columns).to(dtype)
    yield torch.randn(columns, rows).to(dtype).t()
    yield torch.randn(2 * rows, 3 * columns).to(dtype)[::2, ::3]
    yield torch.randn(rows, 1).to(dtype).expand(rows, columns)
    yield torch.randn(1, columns).to(dtype).expand(rows, columns)


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [
        (1, 1, 1),
        (2, 0, 3),
        (0, 4, 3),
        (3, 4, 0),
        (7, 33, 70),
        (48, 300, 65),
        (50, 257, 129),
        (400, 256, 128),
        (5, 9, 999),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_products_of_any_shape_and_layout(rows, inner, columns, dtype, monkeypatch):
    """In half precision each is the sum in float32, rounded once."""
    torch.manual_seed(0)
    monkeypatch.setattr(native, "SMALL", 0)
    for a in layouts(rows, inner, dtype):
        for b in layouts(inner, columns, dtype):
            found = on_threads(lambda a=a, b=b: matmul(a, b))
            assert found.dtype == dtype
            rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * 0.51
            torch.testing.assert_close(
                found.double(), a.double() @ b.double(), rtol=rtol, atol=1e-5 * max(1, inner) ** 0.5
            )


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("columns", [64, 70, 333])
def test_results_in_half_precision_are_the_nearest(columns, dtype):
    """Products of two numbers are exact in float32, and many lie in the middle between two in half precision."""
    torch.manual_seed(0)
    a, b = (torch.randn(count).mul(8).to(dtype) for count in (130, columns))
    a[:4] = torch.tensor([torch.nan, torch.inf, 1.5, -1.0])
    b[:3] = torch.tensor([torch.finfo(dtype).max, 0.0, -torch.inf])
    expected = (a.float()[:, None] * b.float()).to(dtype)
    assert torch.equal(matmul(a[:, None], b[None]).nan_to_num(7.0), expected.nan_to_num(7.0))


@NEEDS_NATIVE
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(every_set):
    """Few rows are multiplied the other way round, with the same additions."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(130, IN), torch.randn(OUT, IN), torch.randn(OUT)
    whole = linear(x, weight, bias)
    for rows in (2, 7, 48, 49, 100):
        assert torch.equal(linear(x[:rows], weight, bias), whole[:rows])
        assert torch.equal(linear(x[-rows:], weight, bias), whole[-rows:])


HALF_WAYS = ["native", "native without pairs", "oneDNN", "by tiles"]


@pytest.fixture(params=HALF_WAYS)
def way(request, calls, monkeypatch):
    """Each way that products of several rows in half precision may take, where this machine has it."""
    monkeypatch.setattr(products, "MATMUL", EVERY_SET if request.param == "native" else frozenset())
    if request.param != "native without pairs":
        monkeypatch.setattr(products, "MATMUL_IN_HALF", products.MATMUL)
    if request.param == "oneDNN" and not products._pairs():
        pytest.skip("needs a CPU with products of pairs of bfloat16")
    if request.param == "native without pairs" and native.library().isa not in products.MATMUL_IN_HALF:
        pytest.skip("needs an instruction set of those for which it was measured")
    if request.param in ("by tiles", "native without pairs"):
        monkeypatch.setattr(products, "_pairs", lambda: False)
    calls.clear()
    return request.param


@NEEDS_NATIVE
@torch.no_grad()
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype, biased, way, calls):
    """Whatever the other rows are, a row has the same bits."""
    if way == "oneDNN" and (biased or dtype == torch.float16):
        pytest.skip("oneDNN is asked for products of bfloat16 without a bias")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(130, IN).to(dtype), torch.randn(OUT, IN).to(dtype), torch.randn(OUT).to(dtype)
    bias = bias if biased else None
    found = linear_of_any_dtype(x.view(2, 65, IN), weight, bias).view(130, OUT)
    assert {*calls} == (
        {"matmul"} if way.startswith("native") else {"onednn"} if way == "oneDNN" else {"dequantize", "onednn"}
    )
    assert found.dtype == dtype
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-3)
    for rows in (17, 48, 49, 100):
        assert torch.equal(linear_of_any_dtype(x[:rows], weight, bias), found[:rows])
        assert torch.equal(linear_of_any_dtype(x[-rows:], weight, bias), found[-rows:])
    with_gaps, turned = torch.stack([x, x], 2).flatten(1)[:, ::2], weight.t().contiguous().t()
    assert torch.equal(linear_of_any_dtype(with_gaps, turned, bias), found)


@NEEDS_NATIVE
@torch.no_grad()
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", [1, FEW_IN_HALF, FEW_IN_HALF + 1, 60])
def test_half_precision_is_what_the_op_gives(rows, dtype, way):
    """Which has the last word where an implementation is forced, and on what does not fit."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, rows, IN).to(dtype), torch.randn(OUT, IN).to(dtype), torch.randn(OUT).to(dtype)
    for own in (bias, None):
        assert torch.equal(linear_of_any_dtype(x, weight, own), quantized_linear(x, weight, bias=own))
    with use("reference"):
        assert torch.equal(linear_of_any_dtype(x, weight, bias), quantized_linear(x, weight, bias=bias))
    for name, arguments in {
        "x": (x[..., 1:], weight, bias),
        "weight": (x, weight[0], None),
    }.items():
        with pytest.raises(ValueError, match=f"quantized_linear: .*`{name}`"):
            linear_of_any_dtype(*arguments)
    with pytest.raises(RuntimeError, match="must match the existing size"):  # PyTorch's, which takes one number for all
        linear_of_any_dtype(x, weight, bias[1:])


@torch.no_grad()
def test_pairs_of_bfloat16_are_not_asked_for_where_onednn_may_not(monkeypatch):
    monkeypatch.setattr(products, "MATMUL", frozenset())
    monkeypatch.setattr(products, "_pairs", lambda: pytest.fail("oneDNN is switched off"))
    x, weight = torch.randn(20, IN).bfloat16(), torch.randn(OUT, IN).bfloat16()
    with torch.backends.mkldnn.flags(enabled=False):
        linear_of_any_dtype(x, weight)


@NEEDS_NATIVE
@torch.no_grad()
@pytest.mark.parametrize(("outputs", "size"), [(LARGE, 1), (1, LARGE), (1001, 525), (400, 1999)], ids=str)
def test_a_token_of_each_sequence_has_the_bits_that_it_has_alone(outputs, size, calls):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(FEW, 1, size), torch.randn(outputs, size), torch.randn(outputs)
    alone = torch.cat([linear(row, weight, bias) for row in x])
    for rows in (2, 3, 4, 5, 7, 8, 15, 16, 17, FEW):
        assert torch.equal(linear(x[:rows], weight, bias)[:, 0], alone[:rows])
    assert {*calls} == {"product"}


@NEEDS_NATIVE
@torch.no_grad()
def test_what_is_not_a_number_stays_in_its_row_and_column(every_set):
    x, weight = torch.randn(60, IN), torch.randn(OUT, IN)
    x[3, 5], weight[70, 9] = torch.nan, torch.inf
    expected = F.linear(x, weight)
    found = linear(x, weight)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@NEEDS_NATIVE
def test_whoever_watches_operators_sees_one_row(calls):
    """Fake tensors, transforms, tangents and modes that count FLOPs need PyTorch's operator."""
    x, weight = torch.randn(1, IN), torch.randn(OUT, IN)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        linear(x, weight)
    assert flops.get_total_flops() == 2 * IN * OUT
    with torch.no_grad():
        assert torch.func.vmap(lambda row: linear(row, weight))(torch.randn(3, IN)).shape == (3, OUT)
        assert linear(x, torch.randn(IN, OUT).t()).shape == (1, OUT)
        assert linear(x, weight, torch.randn(OUT)).shape == (1, OUT)
        with pytest.raises(RuntimeError):
            linear(x, weight, torch.randn(OUT - 1))
    with FakeTensorMode() as mode, torch.no_grad():
        assert linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (1, OUT)
    assert calls.count("product") == 1


@torch.no_grad()
def test_any_strides(every_set):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 2 * IN)[..., ::2], torch.randn(IN, OUT).t()
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    expanded = torch.randn(1, 1, IN).expand(4, 3, IN)
    torch.testing.assert_close(linear(expanded, weight), F.linear(expanded, weight), rtol=1e-4, atol=1e-4)


class TestGradients:
    ROWS = -(-WORK_WITH_GRADIENTS // (IN * OUT))

    def inputs(self, *wanted):
        torch.manual_seed(0)
        x, weight, bias = torch.randn(2, self.ROWS, IN), torch.randn(OUT, IN), torch.randn(OUT)
        return [t.requires_grad_(name in wanted) for name, t in {"x": x, "weight": weight, "bias": bias}.items()]

    @NEEDS_NATIVE
    @pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x",), ("weight",), ("bias",)], ids="-".join)
    def test_they_are_torchs(self, wanted, calls, every_set):
        inputs = self.inputs(*wanted)
        needed = [t for t in inputs if t.requires_grad]
        dy = torch.randn(2, self.ROWS, OUT)
        found = torch.autograd.grad(linear(*inputs), needed, dy)
        assert calls == ["matmul"] * (1 + ("x" in wanted) + ("weight" in wanted))
        expected = torch.autograd.grad(F.linear(*inputs), needed, dy)
        for f, e in zip(found, expected, strict=True):
            assert f.shape == e.shape
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-3)

    @NEEDS_NATIVE
    @pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x",), ("weight",)], ids="-".join)
    def test_among_pytorchs_operations_they_have_the_same_bits(self, wanted, calls, monkeypatch):
        """On every instruction set, as its own threads are taken; second derivatives included."""
        monkeypatch.setattr(products, "MATMUL", frozenset())
        inputs = self.inputs(*wanted)
        needed = [t for t in inputs if t.requires_grad]
        dy = torch.randn(2, self.ROWS, OUT)
        y = among_others(*inputs)
        found = torch.autograd.grad(y, needed, dy)
        assert calls == ["matmul"] * (1 + ("x" in wanted) + ("weight" in wanted))
        monkeypatch.setattr(products, "MATMUL", EVERY_SET)
        expected = linear(*inputs)
        assert torch.equal(y, expected)
        assert all(map(torch.equal, found, torch.autograd.grad(expected, needed, dy)))
        twice = []
        for function in (among_others, F.linear):
            first = torch.autograd.grad(function(*inputs).square().mean(), needed, create_graph=True)
            twice.append(torch.autograd.grad(sum(g.square().sum() for g in first), needed))
        for f, e in zip(*twice, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-3)

    @NEEDS_NATIVE
    def test_among_pytorchs_operations_any_threads_give_the_same_bits(self):
        inputs = self.inputs("x", "weight", "bias")
        dy = torch.randn(2, self.ROWS, OUT)
        for index in (0, 1):
            on_threads(lambda index=index: torch.autograd.grad(among_others(*inputs), inputs, dy)[index])

    def test_among_pytorchs_operations_others_go_its_own_way(self, calls):
        """Few numbers, one row, other dtypes, autocast, and what it takes and we do not."""
        x, weight, bias = self.inputs("x", "weight", "bias")
        assert among_others(x[:, :2], weight, bias).requires_grad
        assert torch.equal(among_others(x[0, 0], weight, bias), F.linear(x[0, 0], weight, bias))
        assert torch.equal(among_others(x, weight, bias[0]), F.linear(x, weight, bias[0]))
        wide = x.double(), weight.double(), bias.double()
        assert torch.equal(among_others(*wide), F.linear(*wide))
        with torch.autocast("cpu", torch.bfloat16):
            assert among_others(x, weight, bias).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="shapes"):
            among_others(x[..., 1:], weight, bias)
        assert not calls

    @NEEDS_NATIVE
    def test_a_gradient_that_lies_otherwise(self, every_set):
        inputs = self.inputs("x", "weight", "bias")
        for reduce in (torch.sum, lambda y: y.transpose(0, 2).contiguous().square().mean()):
            found = torch.autograd.grad(reduce(linear(*inputs)), inputs)
            for f, e in zip(found, torch.autograd.grad(reduce(F.linear(*inputs)), inputs), strict=True):
                torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-3)

    @NEEDS_NATIVE
    def test_second_derivatives_and_batched_gradients(self, every_set):
        inputs = self.inputs("x", "weight", "bias")
        results = []
        for function in (linear, F.linear):
            y = function(*inputs)
            first = torch.autograd.grad(y.square().mean(), inputs, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
        for f, e in zip(*results, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-3)
        dys = torch.randn(2, 2, self.ROWS, OUT)
        batched = [
            torch.autograd.grad(function(*inputs), inputs, dys, is_grads_batched=True)
            for function in (linear, F.linear)
        ]
        for f, e in zip(*batched, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-3)

    @NEEDS_NATIVE
    def test_same_bits_on_any_threads(self, every_set):
        inputs = self.inputs("x", "weight", "bias")
        dy = torch.randn(2, self.ROWS, OUT)
        for index in (0, 1):
            on_threads(lambda index=index: torch.autograd.grad(linear(*inputs), inputs, dy)[index])

    def test_few_go_torchs_own_way(self, calls):
        module, x = Linear(IN, OUT), torch.randn(2, IN, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None
        assert module.weight.grad is not None
        assert not calls


@torch.no_grad()
def test_what_stays_with_torch(calls, monkeypatch):
    monkeypatch.setattr(products, "MATMUL", frozenset())
    large = Linear(IN, OUT)
    small = Linear(8, LARGE // 8 - 1)
    small(torch.randn(1, 8))
    large.double()(torch.randn(1, IN).double())
    large.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert large(torch.randn(1, IN)).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        large(torch.randn(2, IN))
    assert not calls
    large(torch.randn(2, IN))
    assert calls == ["onednn"]


@torch.no_grad()
def test_a_wide_bias_is_added_to_the_same_product(every_set):
    module = WideBiasLinear(IN, OUT)
    x = torch.randn(9, IN)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias), rtol=1e-4, atol=1e-4)


def test_it_is_a_linear_map_to_everyone():
    module = Linear(4, 3)
    assert isinstance(module, nn.Linear)
    assert list(module.state_dict()) == ["weight", "bias"]
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 5))


@torch.no_grad()
def test_compiles():
    module, x = Linear(IN, OUT), torch.randn(2, IN)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


class TestExp:
    @NEEDS_NATIVE
    @pytest.mark.parametrize("count", [0, 1, 7, 4095, 4097, 24576])
    def test_it_is_torchs(self, count, calls):
        x = torch.randn(count) * 5
        torch.testing.assert_close(finite_exp(x), torch.exp(x), rtol=5e-7, atol=0)
        assert calls == ["exp"]

    @NEEDS_NATIVE
    def test_what_is_not_finite(self):
        x = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0])
        torch.testing.assert_close(finite_exp(x), torch.exp(x.clamp(max=88)), equal_nan=True)

    def test_what_stays_with_torch(self, calls):
        for x in (torch.ones(3, requires_grad=True), torch.ones(3).double(), torch.ones(4)[::2]):
            assert torch.equal(finite_exp(x), torch.exp(x))
        assert not calls
