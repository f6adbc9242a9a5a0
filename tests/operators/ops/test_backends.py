"""Faster ways: offered, refused and chosen in words; what calls a kernel is checked against a stand-in of its
interface.
"""

import dataclasses
import functools
import itertools
import logging
import sys
import types

import pytest
import torch
import torch.utils.checkpoint
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import diffusers_graft as dg
from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import MissingDependencyError, OperatorError, UnknownNameError
from diffusers_graft.operators import gated_deltanet, mamba2, neighborhood, sliding_window
from diffusers_graft.operators.base import Mixer
from diffusers_graft.operators.conformance.suite import example_site
from diffusers_graft.operators.ops import backends as _backends
from diffusers_graft.operators.ops import gated_convolution as _hyena
from diffusers_graft.operators.ops.backends import Backend, WithBackends

from ...models import predict, tiny_dit
from ...versions import compiles_layers_once, counts_recompilations, has_varlen_attention
from ..examples import as_dense

SITE = example_site("self_attention")


def qkv(tokens, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, tokens, 4, generator=generator, **options) for _ in range(3)]


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """The norm of mamba-ssm, which knows nothing of promotion."""
    assert bias is None
    assert not norm_before_gate
    assert x.dtype == z.dtype
    return torch.nn.functional.rms_norm(x * torch.nn.functional.silu(z), weight.shape, weight.to(x.dtype), eps)


def band_softmax(query, key, value, scale, window):
    """Softmax in a band: [B, N, H, E] as flash-attn takes it."""
    mask = as_dense(sliding_window.band, ((query.shape[1], *window),))
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale).transpose(1, 2)


def stand_in(monkeypatch, name, **functions):
    """A module of that name, with the packages it lies in."""
    parts = name.split(".")
    for path in (".".join(parts[: end + 1]) for end in range(len(parts))):
        module = types.ModuleType(path)
        monkeypatch.setitem(sys.modules, path, module)
        if "." in path:
            setattr(sys.modules[path.rpartition(".")[0]], path.rpartition(".")[2], module)
    vars(module).update(functions)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_calls_of_flash_attn(monkeypatch, scale):
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        return band_softmax(q, k, v, softmax_scale, window_size)

    stand_in(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    operator, context = dg.operators.SlidingWindow.Config(window=(2, 5)).build(SITE), Context(scale=scale)
    mixed = sliding_window._flash(operator, *qkv(30), context)
    torch.testing.assert_close(mixed, operator(*qkv(30), context))


@has_varlen_attention
def test_calls_of_varlen_attention(monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert cu_seq_q.tolist() == cu_seq_k.tolist() == [0, max_q, 2 * max_q]
        rows = [part.view(2, max_q, 3, 4) for part in (query, key, value)]
        return band_softmax(*rows, scale, window_size).reshape(query.shape)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    operator = dg.operators.SlidingWindow.Config(window=(2, 5)).build(SITE)
    torch.testing.assert_close(sliding_window._varlen(operator, *qkv(30), Context()), operator(*qkv(30), Context()))


def natten_windows(length, kernel, dilation, stride):
    """The places each place of an axis sees, from natten's definition (its `get_window_start`), not from ours."""
    rows = []
    for place in range(length):
        peers = range(place % dilation, length, dilation)
        number = place // dilation
        center = min(number // stride * stride + stride // 2, len(peers) - 1)
        start = min(max(center - kernel // 2, 0), len(peers) - kernel)
        rows.append(peers[start : start + kernel])
    return rows


@pytest.mark.parametrize(
    ("settings_", "grid"),
    [
        ({"kernel": 3}, Grid(height=7, width=9)),
        ({"kernel": 3, "dilation": 2}, Grid(height=7, width=9)),
        ({"kernel": 4, "stride": 2}, Grid(height=7, width=9)),
        ({"kernel": 3}, Grid(height=1, width=9)),
        ({"kernel": 1}, Grid(height=7, width=9)),
        ({"kernel": 3}, Grid(frames=5, height=6, width=5)),
        ({"kernel": 3}, Grid(frames=2, height=6, width=5)),
        ({"kernel": 3, "dilation": 2}, Grid(frames=5, height=6, width=6)),
        ({"kernel": (6, 4, 4), "stride": (6, 2, 2)}, Grid(frames=2, height=6, width=5)),
        ({"kernel": (6, 2, 2), "stride": (6, 2, 2), "dilation": 2}, Grid(frames=5, height=6, width=5)),
        ({"kernel": (6, 2, 2), "stride": (4, 2, 2), "dilation": 2}, Grid(frames=10, height=6, width=5)),
        ({"kernel": (1, 5, 3)}, Grid(frames=4, height=6, width=5)),
        ({"kernel": (3, 1, 3)}, Grid(frames=4, height=6, width=5)),
        ({"kernel": (3, 3, 1)}, Grid(frames=4, height=6, width=5)),
        ({"kernel": (1, 3, 1)}, Grid(frames=4, height=6, width=5)),
        ({"kernel": (1, 1, 1)}, Grid(frames=4, height=6, width=5)),
        ({"kernel": (1, 4, 1), "stride": (1, 2, 1)}, Grid(frames=4, height=6, width=5)),
    ],
    ids=str,
)
def test_calls_of_natten(monkeypatch, settings_, grid):
    def natten(query, key, value, kernel_size, stride=None, dilation=1, scale=None):
        stride = stride or (1,) * len(kernel_size)
        # As natten 0.21 checks them.
        assert all(size >= 2 for size in kernel_size)
        assert all(step <= size for step, size in zip(stride, kernel_size, strict=True))
        axes = tuple(zip(query.shape[1:-2], kernel_size, dilation, stride, strict=True))
        mask = as_dense(natten_windows, axes)
        parts = (part.flatten(1, -3).transpose(1, 2) for part in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale)
        return mixed.transpose(1, 2).reshape(query.shape)

    stand_in(monkeypatch, "natten.functional", na1d=natten, na2d=natten, na3d=natten)
    operator, context = dg.operators.get("neighborhood").Config(**settings_).build(SITE), Context(grid=grid)
    mixed = neighborhood._natten(operator, *qkv(grid.tokens), context)
    torch.testing.assert_close(mixed, operator(*qkv(grid.tokens), context))


@pytest.mark.parametrize("name", ["hyena_x", "hyena_se", "hyena_y"])
def test_calls_of_causal_conv1d(monkeypatch, name):
    def causal_conv1d_fn(x, weight, bias=None):
        channels, taps = weight.shape
        return torch.nn.functional.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=channels)[
            ..., : x.shape[-1]
        ]

    stand_in(monkeypatch, "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    operator = dg.operators.get(name).Config().build(SITE)
    mixed = _hyena._causal_conv1d(operator, *qkv(30), Context())
    torch.testing.assert_close(mixed, operator(*qkv(30), Context()))


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"backend": "causal_conv1d", "layout": "2d"}, "is for the layout causal_1d"),
        ({"backend": "causal_conv1d", "kernel_size": 5}, "kernel sizes from 2 to 4"),
        ({"backend": "triton", "layout": "3d"}, "knows no layout 3d"),
        ({"backend": "triton", "layout": "2d"}, "at most 8 taps, and these have 16"),
    ],
    ids=str,
)
def test_a_backend_refuses_settings_before_a_model_is_touched(settings_, said):
    config = dg.operators.configure({"operator": "hyena_se", **settings_})
    with pytest.raises(OperatorError, match=said):
        config.build(SITE)


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2"])
def test_kernels_that_torch_cannot_compile_leave_graphs_whole(monkeypatch, name):
    """fla closes its functions to torch.compile."""

    class Every(torch.autograd.Function):
        """The first tensor times the sum of all that are in the others."""

        @staticmethod
        def forward(ctx, value, *others):
            ctx.save_for_backward(value, *others)
            return value * sum(other.sum() for other in others)

        @staticmethod
        def backward(ctx, gradient):
            value, *others = ctx.saved_tensors
            by_others = [(gradient * value).sum().expand(other.shape).contiguous() for other in others]
            return gradient * sum(other.sum() for other in others), *by_others

    @torch.compiler.disable
    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None):
        return Every.apply(v, q, k, g, beta), None

    @torch.compiler.disable
    def mamba_chunk_scan_combined(x, dt, rate, key, query, chunk_size):
        assert chunk_size == 32
        return Every.apply(x, dt, rate, key, query)

    def every_norm(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
        return Every.apply(x, z, weight)

    stand_in(monkeypatch, "fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)
    stand_in(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    stand_in(monkeypatch, "mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=every_norm)
    torch.manual_seed(0)
    operator = dg.operators.get(name).Config().build(SITE)
    run = type(operator).backends[0].run
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    for call in (run, compiled):
        tokens = tokens_in().requires_grad_()
        mixed = call(operator, tokens, Context())
        parameters = [tokens, *operator.parameters()]
        found.append([mixed, *torch.autograd.grad(mixed.square().sum(), parameters, allow_unused=True)])
    assert sum(gradient is not None for gradient in found[0]) > 4
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def tokens_in(number=30):
    return torch.randn(2, number, SITE.width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_calls_of_fla(monkeypatch, bidirectional):
    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None):
        """[B, N, H, E] and [B, N, H]; heads one by one."""
        heads = [
            gated_deltanet.token_by_token(*(part[:, :, head] for part in (q * scale, k, v, beta, g)), backwards=False)
            for head in range(q.shape[2])
        ]
        return torch.stack(heads, 2), None

    stand_in(monkeypatch, "fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)
    operator = dg.operators.get("gated_deltanet").Config(bidirectional=bidirectional).build(SITE)
    mixed = gated_deltanet._fla(operator, tokens_in(), Context())
    torch.testing.assert_close(mixed, operator(tokens_in(), Context()))


@pytest.mark.parametrize("settings_", [{}, {"bidirectional": False}, {"scan": "zigzag"}], ids=str)
def test_calls_of_mamba_ssm(monkeypatch, settings_):
    def mamba_chunk_scan_combined(x, dt, rate, key, query, chunk_size):
        """The kernel's x [B, N, H, P], dt [B, N, H], A [H], B and C [B, N, groups, S]."""
        state, outputs = 0, []
        for i in range(x.shape[1]):
            added = (dt[:, i, :, None] * x[:, i])[..., None] * key[:, i, 0][:, None, None]
            state = (dt[:, i] * rate).exp()[..., None, None] * state + added
            outputs.append((state * query[:, i, 0][:, None, None]).sum(-1))
        return torch.stack(outputs, 1)

    stand_in(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    stand_in(monkeypatch, "mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=rmsnorm_fn)
    operator = dg.operators.get("mamba2").Config(**settings_).build(SITE)
    torch.nn.init.normal_(operator.norm.weight)
    context = Context(grid=Grid(height=5, width=6))
    torch.testing.assert_close(mamba2._mamba_ssm(operator, tokens_in(), context), operator(tokens_in(), context))


def test_a_backend_that_is_not_installed_names_the_extra_and_touches_nothing():
    model = tiny_dit()
    before = predict(model)
    with pytest.raises(
        MissingDependencyError, match=r"'natten' of neighborhood needs natten.*diffusers-graft\[kernels\]"
    ):
        model.set_graft({"self_attention[0]": {"operator": "neighborhood", "backend": "natten"}})
    assert model.graft is None
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize("has_kernels", [True, False])
def test_natten_without_its_kernels_is_as_if_it_were_not_installed(monkeypatch, has_kernels):
    """It would run by FlexAttention, far slower than plain torch."""
    stand_in(monkeypatch, "natten.functional", na2d=None)
    sys.modules["natten"].HAS_LIBNATTEN = has_kernels
    config = dg.operators.configure({"operator": "neighborhood", "backend": "natten"})
    site = example_site("self_attention")
    if has_kernels:
        config.build(site)
        return
    with pytest.raises(MissingDependencyError, match="'natten' of neighborhood needs natten"):
        config.build(site)
    # "auto" asks in the same way, and takes plain torch.
    backend = config.owner.backends[0]
    with pytest.raises(MissingDependencyError):
        _backends._import(backend, "neighborhood")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is there")
@pytest.mark.parametrize("name", ["hyena_x", "block_sparse"])
def test_a_kernel_of_ours_asked_for_where_it_is_not_says_so(monkeypatch, name):
    config = dg.operators.configure({"operator": name, "backend": "triton"})
    pytest.importorskip("triton")
    with pytest.raises(OperatorError, match="'triton' was asked for, but it runs on cuda, and the tensors are on cpu"):
        config.build(SITE)(*qkv(64), Context(grid=Grid(height=8, width=8)))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependencyError, match=rf"'triton' of {name} needs triton.*diffusers-graft\[kernels\]"):
        config.build(SITE)


def test_an_unknown_backend():
    with pytest.raises(UnknownNameError, match="no backend of neighborhood 'naten'. Did you mean 'natten'"):
        dg.operators.configure({"operator": "neighborhood", "backend": "naten"})


@has_varlen_attention
def test_a_backend_asked_for_runs_or_says_why_not():
    inputs = qkv(64)
    with pytest.raises(OperatorError, match="'varlen' was asked for, but it runs on cuda, and the tensors are on cpu"):
        dg.operators.SlidingWindow.Config(backend="varlen").build(SITE)(*inputs, Context())
    with pytest.raises(OperatorError, match="'flex' was asked for, but it has no backward on cpu"):
        dg.operators.SlidingWindow.Config(backend="flex").build(SITE)(
            *[part.requires_grad_() for part in inputs], Context()
        )
    query, key, value = qkv(64)
    with pytest.raises(OperatorError, match="'flex' was asked for, but it has no backward on cpu"):
        dg.operators.SlidingWindow.Config(backend="flex").build(SITE)(query, key, value.requires_grad_(), Context())
    assert "torch.bfloat16" in Backend("x", None, "x").obstacle("cuda", torch.float32, False)


def fake(run):
    """An operator with one backend, of a module that is there and a device that every machine has."""

    class Fake(WithBackends, Mixer):
        backends = (Backend("quick", run, "math", dtypes=(), runs_on=("cpu",), trains_on=("cpu",), pays_on=("cpu",)),)

        def in_torch(self, query, key, value, context):
            return query * key + value

    return Fake.Config(backend="auto").build(SITE)


def right(operator, query, key, value, context):
    return (query * key + value) * 1.001


def wrong(operator, query, key, value, context):
    return (query * key + value) * 1.5


def broken(operator, query, key, value, context):
    return query.no_such_thing


@pytest.fixture
def seconds(monkeypatch):
    """What each backend takes by the clock, and the backends that were timed."""
    table = {"quick": 0.5, "torch": 1.0}
    timed = []

    def time(operator, backend, inputs, context, grad):
        timed.append(backend.name if backend else "torch")
        return table[timed[-1]]

    monkeypatch.setattr(_backends, "_time", time)
    table["timed"] = timed
    return table


@pytest.mark.parametrize(
    ("run", "taken", "said", "output"),
    [
        (right, 0.5, "backend quick on cpu", 1.001),
        (right, 1.04, "backend quick on cpu", 1.001),
        (right, 1.1, "backend torch on cpu", 1.0),
        (wrong, 0.5, "differs from plain torch", 1.0),
        (broken, 0.5, "backend torch on cpu", 1.0),
    ],
    ids=["faster", "a tie", "slower", "wrong", "broken"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_auto_takes_the_fastest_that_agrees_and_says_so_once(caplog, seconds, run, taken, said, output, grad):
    seconds["quick"] = taken
    operator, (query, key, value) = fake(run), qkv(9)
    query.requires_grad_(grad)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            mixed = operator(query, key, value, Context())
    torch.testing.assert_close(mixed, (query * key + value) * output)
    assert sum(said in message for message in caplog.messages) == 1


def test_auto_measures_once_for_a_class_of_shapes(seconds):
    operator = fake(right)
    timed = seconds["timed"]
    for tokens in (9, 12, 16):
        operator(*qkv(tokens), Context())
    type(operator).Config(backend="auto").build(SITE)(*qkv(9), Context())
    assert timed == ["quick", "torch"]
    operator(*qkv(17), Context())
    assert len(timed) == 4
    operator(*qkv(16), Context(grid=Grid(height=4, width=4)))
    assert len(timed) == 6
    operator(*qkv(9, requires_grad=True), Context())
    assert len(timed) == 8


@pytest.mark.parametrize("is_measured", [False, True])
def test_compiled_code_recalls_and_measures_nothing(seconds, is_measured):
    seconds["quick"] = 2.0
    operator, inputs = fake(right), qkv(9)
    if is_measured:
        operator(*inputs, Context())
        seconds["timed"].clear()
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="eager")
    query, key, value = inputs
    # Where nothing was measured, the first backend that is right.
    factor = 1.0 if is_measured else 1.001
    torch.testing.assert_close(compiled(*inputs, Context()), (query * key + value) * factor)
    assert not seconds["timed"]


def test_a_counted_forward_measures_nothing(seconds):
    operator, (query, key, value) = fake(right), qkv(9)
    with FlopCounterMode(display=False):
        counted = operator(query, key, value, Context())
    torch.testing.assert_close(counted, query * key + value)
    assert not seconds["timed"]


def test_measuring_leaves_no_trace_in_a_checkpointed_forward():
    """Its own graph would be taken for the forward's; random numbers stay those that they are."""
    calls = []

    def run(operator, query, key, value, context):
        calls.append(query)
        return (query * key + value) * operator.scale

    operator = fake(run)
    operator.scale = torch.nn.Parameter(torch.tensor(1.001))
    query, key, value = qkv(9, requires_grad=True)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    output = torch.utils.checkpoint.checkpoint(operator, query, key, value, Context(), use_reentrant=False)
    assert torch.equal(torch.rand(1), expected)
    assert calls
    assert query.grad is None
    assert operator.scale.grad is None
    gradient, *_ = torch.autograd.grad(output.sum(), [query])
    torch.testing.assert_close(gradient, key * (output / (query * key + value)).detach())


@pytest.fixture
def compilations(monkeypatch):
    """Counts them, and leaves out the slow half of compiling."""
    counter, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(_backends, "_compiled", functools.cache(_backends._compiled.__wrapped__))
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=counter))
    return counter


@compiles_layers_once
@pytest.mark.parametrize("name", ["hyena_se", "linear_attention", "ttt"])
@pytest.mark.parametrize("grad", [False, True])
def test_layers_compile_once(compilations, name, grad):
    for index in range(3):
        torch.manual_seed(index)
        site = dataclasses.replace(SITE, index=index, path=f"blocks.{index}.attn1")
        compiled, plain = (
            dg.operators.configure({"operator": name, "backend": backend}).build(site)
            for backend in ("compiled", "torch")
        )
        plain.load_state_dict(compiled.state_dict())
        found = []
        for operator in (compiled, plain):
            inputs = [part.requires_grad_(grad) for part in qkv(30)]
            with torch.set_grad_enabled(grad):
                mixed = operator(*inputs, Context(grid=Grid(height=5, width=6)))
            wanted = [*inputs, *operator.parameters()]
            found.append([mixed, *(torch.autograd.grad(mixed.square().sum(), wanted) if grad else ())])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert compilations.frame_count == 1


def test_settings_do_not_use_up_each_others_compilations(compilations):
    for name, layout, grad in itertools.product(
        ["hyena_x", "hyena_y"], ["causal_1d", "centered_1d", "2d"], [True, False]
    ):
        operator = dg.operators.configure({"operator": name, "layout": layout, "backend": "compiled"}).build(SITE)
        with torch.set_grad_enabled(grad):
            operator(*qkv(30), Context(grid=Grid(height=5, width=6)))
    assert compilations.frame_count == 12


def test_counting_leaves_it_compiled(compilations):
    operator = dg.operators.configure({"operator": "hyena_x", "backend": "compiled"}).build(SITE)
    inputs = (*qkv(30), Context())
    with FlopCounterMode(display=False):
        counted = operator(*inputs)
    torch.testing.assert_close(operator(*inputs), counted)
    assert compilations.frame_count == 1


@counts_recompilations
def test_more_shapes_than_torch_compiles_are_an_error(compilations):
    operator = dg.operators.configure({"operator": "hyena_y", "backend": "compiled"}).build(SITE)
    with torch._dynamo.config.patch(recompile_limit=2):
        for tokens in (8, 9):
            operator(*qkv(tokens), Context())
        with pytest.raises(
            OperatorError, match="hyena_y: torch compiles one operator for so many shapes.*met one more"
        ):
            operator(*qkv(10), Context())


@pytest.mark.long
@pytest.mark.parametrize("name", ["hyena_x", "hyena_se", "linear_attention", "ttt"])
def test_what_torch_compiles_agrees_at_any_size(name):
    torch.manual_seed(0)
    settings_ = {"layout": "2d", "kernel_size": 3} if "hyena" in name else {}
    operator = dg.operators.configure({"operator": name, "init": "random", "backend": "compiled", **settings_}).build(
        SITE
    )
    for height, width in ((8, 8), (5, 7)):
        inputs, context = qkv(height * width, requires_grad=True), Context(grid=Grid(height=height, width=width))
        found = []
        for call in (operator, operator.in_torch):
            mixed = call(*inputs, context)
            gradients = torch.autograd.grad(mixed.square().sum(), inputs)
            with torch.no_grad():
                found.append([mixed, call(*inputs, context), *gradients])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sliding_window", "hyena_x", "linear_attention", "ttt"])
def test_the_context_may_be_named(name):
    operator, context = dg.operators.get(name).Config().build(SITE), Context(grid=Grid(height=5, width=6))
    assert torch.equal(operator(*qkv(30), context=context), operator(*qkv(30), context))


def test_auto_is_plain_torch_on_a_cpu():
    inputs = qkv(64)
    expected = dg.operators.SlidingWindow.Config().build(SITE)(*inputs, Context())
    automatic = dg.operators.SlidingWindow.Config(backend="auto").build(SITE)
    assert torch.equal(automatic(*inputs, Context()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(automatic, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, Context()), expected)


HALVES = (torch.float16, torch.bfloat16)


def recording(dtypes):
    """An operator with one backend that takes half precision alone, and the dtypes it is given."""
    given_ = []

    def run(operator, query, key, value, context):
        given_.extend(part.dtype for part in (query, key, value))
        return query * key + value

    class Recording(WithBackends, Mixer):
        backends = (Backend("half", run, "math", dtypes=dtypes, runs_on=("cpu",), trains_on=("cpu",)),)

        def in_torch(self, query, key, value, context):
            return query * key + value

    return Recording.Config(backend="half").build(SITE), given_


@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast_a_kernel_is_given_what_torch_computes_in(grad):
    operator, given_ = recording(HALVES)
    inputs = [part.requires_grad_(grad) for part in qkv(9)]
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        output = operator(*inputs, Context())
    assert given_ == [torch.bfloat16] * 3
    assert output.dtype == torch.bfloat16
    if grad:
        output.sum().backward()
        assert all(part.grad.dtype == torch.float32 for part in inputs)


def test_without_autocast_a_kernel_of_half_precision_refuses_float32():
    operator, _ = recording(HALVES)
    with pytest.raises(OperatorError, match="the tensors are torch.float32"):
        operator(*qkv(9), Context())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(OperatorError, match="the tensors are torch.float64"):
        operator(*qkv(9, dtype=torch.float64), Context())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_of_mamba_computes_in_the_precision_of_its_block(monkeypatch, dtype):
    given_ = []

    def mamba_chunk_scan_combined(x, dt, rate, key, query, chunk_size):
        given_.extend([x.dtype, key.dtype, query.dtype])
        return x

    stand_in(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    stand_in(monkeypatch, "mamba_ssm.ops.triton.layernorm_gated", rmsnorm_fn=rmsnorm_fn)
    operator = dg.operators.get("mamba2").Config().build(SITE)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        mamba2._mamba_ssm(operator, tokens_in(), Context())
    assert set(given_) == {dtype}
