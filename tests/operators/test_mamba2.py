"""Mamba-2 against transformers' own, and its orders of scanning."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusers_graft.core.context import Context, Grid
from diffusers_graft.errors import GeometryError, OperatorError
from diffusers_graft.operators import configure
from diffusers_graft.operators.ops.scans import (
    visits,
)

from .recurrences import ATTENTION, DIT_XL, build, draw, parameters


def transformers_mamba2(monkeypatch, **settings):
    """Their module as torch alone runs it, in float64: they sum in float32."""
    pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    mixer = Mamba2Mixer(Mamba2Config(**settings), layer_idx=0).double().eval()
    norm = mixer.norm
    monkeypatch.setattr(
        norm, "forward", lambda y, z: F.rms_norm(y * F.silu(z), y.shape[-1:], norm.weight, norm.variance_epsilon)
    )
    return mixer


@pytest.mark.parametrize("tokens", [1, 3, 8, 37])
def test_mamba2_and_its_gradients_are_transformers(tokens, monkeypatch):
    theirs = transformers_mamba2(
        monkeypatch,
        hidden_size=12,
        num_heads=6,
        head_dim=4,
        state_size=5,
        expand=2,
        n_groups=1,
        conv_kernel=4,
        chunk_size=8,
        use_bias=False,
        use_conv_bias=True,
    )
    ours = build({"operator": "mamba2", "state": 5, "head_width": 4, "chunk": 8, "bidirectional": False})
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    hidden_states = draw(2, tokens, 12).requires_grad_()
    fast, plain = ours(hidden_states, Context()), theirs(hidden_states)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    weights, names = draw(*fast.shape, seed=9), [name for name, _ in ours.named_parameters()]
    for module, output in ((ours, fast), (theirs, plain)):
        (output * weights).sum().backward()
        module.gradient, hidden_states.grad = hidden_states.grad, None
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=1e-9, atol=1e-9)
    for name in names:
        torch.testing.assert_close(
            ours.get_parameter(name).grad, theirs.get_parameter(name).grad, rtol=1e-9, atol=1e-9
        )


def test_mamba2_has_the_papers_parameters():
    assert parameters({"operator": "mamba2", "bidirectional": False}) == 8_290_864
    assert parameters("mamba2") == 8_290_864
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in configure("mamba2").build(DIT_XL).state_dict().items()}
    assert shapes == {
        "in_proj.weight": (4880, 1152),
        "conv1d.weight": (2432, 1, 4),
        "conv1d.bias": (2432,),
        "dt_bias": (144,),
        "A_log": (144,),
        "D": (144,),
        "norm.weight": (2304,),
        "out_proj.weight": (1152, 2304),
    }


@pytest.mark.parametrize("scan", ["column", "zigzag"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_scan_is_a_raster_scan_of_tokens_put_in_order(scan, bidirectional):
    spec, grid = {"operator": "mamba2", "bidirectional": bidirectional}, Grid(frames=2, height=3, width=4)
    raster, other = build(spec), build({**spec, "scan": scan})
    other.load_state_dict(raster.state_dict())
    hidden_states, order = draw(2, 24, 12), visits(grid, scan)
    expected = torch.empty_like(hidden_states)
    expected[:, order] = raster(hidden_states[:, order], Context())
    torch.testing.assert_close(other(hidden_states, Context(grid=grid)), expected)
    with pytest.raises(GeometryError, match="gave no grid"):
        other(hidden_states, Context())


def test_chunks_change_nothing():
    hidden_states, results = draw(1, 29, 12), []
    for chunk in (1, 8, 29, 64):
        torch.manual_seed(0)
        results.append(build({"operator": "mamba2", "chunk": chunk})(hidden_states, Context()))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_a_chunk_is_no_longer_than_the_tokens(name):
    operator, tokens = build({"operator": name, "chunk": 1000}), draw(1, 12, ATTENTION.width)
    exact = build({"operator": name, "chunk": 12})
    exact.load_state_dict(operator.state_dict())
    with FlopCounterMode(display=False) as counter:
        torch.testing.assert_close(operator(tokens, Context()), exact(tokens, Context()), rtol=0, atol=0)
    assert counter.get_total_flops() == pytest.approx(
        2 * (operator.flops(12) - operator.uncounted_flops(12)), rel=0.01
    )
    assert operator.flops(12) == exact.flops(12)


def test_heads_of_mamba2_divide_the_inner_width():
    assert configure("mamba2").resolved(DIT_XL).head_width == 16
    assert configure("mamba2").resolved(ATTENTION).head_width == 12
    with pytest.raises(OperatorError, match=r"heads of 16 do not divide .* 2 \* 12 = 24"):
        build({"operator": "mamba2", "head_width": 16})


def test_mamba2_keeps_its_state_in_float32():
    """A state of 4096 tokens kept in bfloat16 would be wrong by percents."""
    operator = configure("mamba2").build(ATTENTION)
    hidden_states = draw(1, 4096, 12).bfloat16()
    precise = operator.double()(hidden_states.double(), Context())
    error = (operator.bfloat16()(hidden_states, Context()).double() - precise).norm() / precise.norm()
    assert error < 0.03


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_the_output_layer_is_the_last_step(name):
    """What `dg.closed_form` solves for: zero its weights, and nothing but its bias is left."""
    operator = build(name)
    layer = operator.get_submodule(operator.output_layer)
    torch.nn.init.zeros_(layer.weight)
    expected = torch.zeros(12) if layer.bias is None else layer.bias
    assert torch.equal(operator(draw(1, 5, 12), Context()), expected.double().expand(1, 5, 12))
