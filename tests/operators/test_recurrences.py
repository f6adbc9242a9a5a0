"""Operators whose state learns or decays from token to token, against definitions written independently of them."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import diffusers_graft as dg
from diffusers_graft.core.sites import Context, Grid, Site
from diffusers_graft.errors import GeometryError, GraftError, OperatorError
from diffusers_graft.operators import Mixer, Projections, configure
from diffusers_graft.operators.conformance.suite import example_site
from diffusers_graft.operators.ops.scans import (
    _in_groups,
    _one_by_one,
    carried,
    decay,
    gated_delta_rule,
    state_space,
    visits,
)

from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit

ATTENTION = example_site("self_attention")
DIT_XL = Site(kind="self_attention", index=0, path="x", width=1152, heads=16, head_width=72)


def build(spec, site=ATTENTION):
    return configure(spec).build(site).double().eval()


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(tokens, batch=1):
    return [draw(batch, 3, tokens, 4, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("chunks", [8, 9, 13])
def test_groups_of_chunks_carry_what_a_loop_does(chunks, backwards, matrices):
    added = draw(2, chunks, 3, 5).requires_grad_()
    kept = (draw(2, chunks, 3, 3) / 2 if matrices else draw(2, chunks, 3, 1).sigmoid()).requires_grad_()
    start = torch.zeros_like(added[:, 0])
    loop, _ = _one_by_one(added, kept, start, backwards, matrices)
    same_with_gradients(_in_groups(added, kept, start, 3, backwards, matrices), loop, (added, kept))
    same_with_gradients(carried(added, kept, backwards=backwards, matrices=matrices), loop, (added, kept))


@pytest.mark.parametrize("matrices", [False, True])
def test_states_keep_their_precision_under_autocast(matrices):
    """In bfloat16 a state that forgets slowly would be wrong by a fifth."""
    added, kept = (
        draw(1, 256, 8, 8).float(),
        torch.eye(8).expand(1, 256, 8, 8) * 0.998 if matrices else torch.full((1, 256, 1, 1), 0.998),
    )
    with torch.autocast("cpu", torch.bfloat16):
        states = carried(added, kept, backwards=False, matrices=matrices)
    torch.testing.assert_close(states, carried(added, kept, backwards=False, matrices=matrices))


def parameters(spec):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in configure(spec).build(DIT_XL).parameters())


def same_with_gradients(fast, plain, wanted, tolerance=1e-9):
    """Outputs, and gradients of a fixed weighting of them."""
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=tolerance)
    weights = draw(*fast.shape, seed=9)
    found = (torch.autograd.grad((output * weights).sum(), wanted, retain_graph=True) for output in (fast, plain))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "spec",
    [
        "ttt",
        {"operator": "ttt", "steps": 2, "convolution": False},
        "mamba2",
        {"operator": "mamba2", "scan": "zigzag", "state": 8},
        {"operator": "mamba2", "bidirectional": False, "head_width": 4, "chunk": 5},
        "gated_deltanet",
        {"operator": "gated_deltanet", "bidirectional": False, "chunk": 5, "init": "random"},
    ],
    ids=str,
)
def test_a_graft_trains_comes_back_and_comes_out_bit_for_bit(spec, tmp_path):
    model = tiny_dit()
    before, tensors = predict(model), tensors_of(model)
    model.set_graft({"self_attention[1::2]": spec})
    start = predict(model)
    assert start.isfinite().all()
    assert not torch.equal(start, before)
    dg.finetune(model, batches(), dg.FinetuneConfig(steps=1, lr=1e-3, progress=False), noise_scheduler=SCHEDULER)
    trained = predict(model)
    assert not torch.equal(trained, start)
    model.save_graft(tmp_path)
    fresh = tiny_dit()
    fresh.load_graft(tmp_path)
    assert torch.equal(predict(fresh), trained)
    model.unset_graft()
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)


@pytest.mark.parametrize(
    "spec",
    [
        {"operator": "ttt", "steps": 0},
        {"operator": "ttt", "steps": True},
        {"operator": "ttt", "steps": 1.0},
        {"operator": "ttt", "convolution": 1},
        {"operator": "ttt", "convolution": "2d"},
        {"operator": "mamba2", "state": 0},
        {"operator": "mamba2", "expand": 1.5},
        {"operator": "mamba2", "conv": True},
        {"operator": "mamba2", "head_width": "16"},
        {"operator": "mamba2", "chunk": None},
        {"operator": "mamba2", "scan": "diagonal"},
        {"operator": "mamba2", "bidirectional": 1},
        {"operator": "gated_deltanet", "chunk": 0},
        {"operator": "gated_deltanet", "chunk": 8.0},
        {"operator": "gated_deltanet", "bidirectional": None},
    ],
)
def test_bad_settings_are_refused(spec):
    with pytest.raises(GraftError, match=spec["operator"]):
        configure(spec)


def inner_loss(first, second, k, v):
    return ((F.silu(k @ first) @ second - v) ** 2).sum() / math.sqrt(k.shape[1]) / (2 * len(k))


def ttt_by_hand(operator, query, key, value, steps):
    """Head by head, by functional derivatives of the inner loss."""
    rows = []
    for head in range(query.shape[1]):
        q, k, v = query[0, head], key[0, head], value[0, head]
        k = (k - k.mean(0)) / (k.var(0, correction=0) + 1).sqrt()
        first, second = operator.first[head], operator.second[head]
        for _ in range(steps):
            descent = torch.func.grad(inner_loss, argnums=(0, 1))(first, second, k, v)
            first, second = first - descent[0], second - descent[1]
        rows.append(F.silu(q @ first) @ second)
    return torch.stack(rows)[None]


@pytest.mark.parametrize("steps", [1, 3])
def test_ttt_and_its_gradients_by_definition(steps):
    operator = build({"operator": "ttt", "steps": steps, "convolution": False})
    torch.nn.init.normal_(operator.first), torch.nn.init.normal_(operator.second)
    inputs = [part.requires_grad_() for part in qkv(11)]
    fast, plain = operator(*inputs, Context()), ttt_by_hand(operator, *inputs, steps)
    same_with_gradients(fast, plain, [*inputs, *operator.parameters()])


def test_ttt_learns_to_give_the_value_of_a_key():
    """What a step is for: the inner loss falls, and queries that are the keys come nearer to the values."""
    _, key, _ = qkv(40)
    value = key.roll(1, -1)
    errors = []
    for steps in (1, 10, 100):
        operator = build({"operator": "ttt", "steps": steps, "convolution": False})
        torch.nn.init.normal_(operator.first, generator=torch.Generator().manual_seed(1))
        errors.append((operator(key, key, value, Context()) - value).norm())
    assert errors[0] > errors[1] > errors[2]


def test_ttt_convolves_each_frame_by_itself():
    operator, plain = build("ttt"), build({"operator": "ttt", "convolution": False})
    plain.load_state_dict(operator.state_dict(), strict=False)
    grid, inputs = Grid(frames=2, height=3, width=4), qkv(24)
    operator.init_from(None)
    torch.testing.assert_close(operator(*inputs, Context(grid=grid)), plain(*inputs, Context()))
    with torch.no_grad():
        operator.convolutions["query"].weight.fill_(0.1)
        neighbours = [8, 9, 4, 5]
        query = inputs[0].clone()
        query[:, :, 8] += 0.1 * inputs[0][:, :, neighbours].sum(2)
    expected = plain(query, *inputs[1:], Context())[:, :, 8]
    torch.testing.assert_close(operator(*inputs, Context(grid=grid))[:, :, 8], expected)


def test_ttt_has_the_papers_parameters():
    assert parameters("ttt") == 2 * 16 * 72**2 + 20 * 1152
    assert parameters({"operator": "ttt", "convolution": False}) == 2 * 16 * 72**2


@pytest.mark.parametrize("spec", ["ttt", {"operator": "mamba2", "scan": "zigzag"}, "gated_deltanet"], ids=str)
def test_tensors_that_only_pretend_pass_through(spec):
    with FakeTensorMode():
        forward_and_backward(spec, 9)()


class Written(TorchDispatchMode):
    """Counts the elements that operations write, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor))
        return made


def forward_and_backward(spec, side):
    """A function that runs an operator on a grid of that side, both ways."""
    operator = configure(spec).build(Site(kind="self_attention", index=0, path="x", width=64, heads=1, head_width=64))
    shapes = [(1, 1, side * side, 64)] * 3 if isinstance(operator, Mixer) else [(1, side * side, 64)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return lambda: operator(*inputs, Context(grid=Grid(height=side, width=side))).sum().backward()


def written(spec, side):
    with Written() as count:
        forward_and_backward(spec, side)()
    return count.elements


LINEAR = [
    "ttt",
    "mamba2",
    {"operator": "mamba2", "bidirectional": False},
    "gated_deltanet",
    {"operator": "gated_deltanet", "bidirectional": False},
]


@pytest.mark.parametrize("spec", LINEAR, ids=str)
def test_work_grows_as_tokens(spec):
    """Slices taken in a loop over chunks pass every other test, and have a backward that is quadratic in tokens."""
    assert written(spec, 64) / written(spec, 32) < 4.3


def test_orders_visit_what_they_say():
    grid = Grid(height=3, width=4)
    assert visits(grid, "raster").tolist() == list(range(12))
    assert visits(grid, "column").tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert visits(grid, "zigzag").tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]


@pytest.mark.parametrize("order", ["raster", "column", "zigzag"])
def test_frames_are_visited_one_after_the_other(order):
    one, film = visits(Grid(height=3, width=4), order), visits(Grid(frames=3, height=3, width=4), order)
    assert film.tolist() == [12 * frame + place for frame in range(3) for place in one.tolist()]


def test_a_zigzag_never_jumps():
    places = [divmod(token, 5) for token in visits(Grid(height=4, width=5), "zigzag").tolist()]
    assert all(abs(y - v) + abs(x - u) == 1 for (y, x), (v, u) in zip(places, places[1:], strict=False))


def state_space_inputs(tokens):
    value, key, query = draw(2, tokens, 3, 4), draw(2, tokens, 5, seed=1), draw(2, tokens, 5, seed=2)
    return [part.requires_grad_() for part in (value, key, query, -draw(2, tokens, 3, seed=3).abs())]


def one_way(value, key, query, log_decay):
    """Every pair of tokens by itself: what a token says, decayed at each token after it up to the one that listens."""
    rows = []
    for i in range(value.shape[1]):
        said = [
            (query[:, i] * key[:, j]).sum(-1)[:, None, None]
            * log_decay[:, j + 1 : i + 1].sum(1).exp()[..., None]
            * value[:, j]
            for j in range(i + 1)
        ]
        rows.append(sum(said))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 4), (4, 4), (13, 4), (13, 1), (16, 5), (9, 32)])
def test_a_state_space_pair_by_pair(tokens, chunk):
    inputs = state_space_inputs(tokens)
    fast = state_space(*inputs, chunk=chunk, bidirectional=False)
    same_with_gradients(fast, one_way(*inputs), inputs)


@pytest.mark.parametrize("strength", [5.0, 50.0, 500.0])
def test_a_state_that_is_soon_forgotten(strength):
    inputs = state_space_inputs(40)
    inputs[3] = (strength * inputs[3].detach()).requires_grad_()
    same_with_gradients(state_space(*inputs, chunk=16, bidirectional=False), one_way(*inputs), inputs)


def test_decay_is_nothing_or_no_tiny_number():
    log_decay = -torch.linspace(0, 200, 2001, dtype=torch.float32)
    left = decay(log_decay)
    assert torch.equal(left[log_decay > -40], log_decay[log_decay > -40].exp())
    assert left[log_decay < -40].eq(0).all()


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 4), (13, 4), (13, 1), (16, 5), (9, 32)])
def test_both_ways_are_the_sum_of_two_with_every_token_once(tokens, chunk):
    inputs = state_space_inputs(tokens)
    fast = state_space(*inputs, chunk=chunk, bidirectional=True)
    back = one_way(*(part.flip(1) for part in inputs)).flip(1)
    value, key, query, _ = inputs
    plain = one_way(*inputs) + back - (query * key).sum(-1)[..., None, None] * value
    same_with_gradients(fast, plain, inputs)


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


def delta_inputs(tokens):
    query, key, value = (draw(2, tokens, 4, seed=seed) for seed in range(3))
    key = F.normalize(key, dim=-1)
    return [
        part.requires_grad_()
        for part in (query, key, value, draw(2, tokens, seed=3).sigmoid(), -draw(2, tokens, seed=4).abs())
    ]


def delta_by_matrices(query, key, value, strength, log_decay):
    """The paper's Eq. 10, row by row: the state as a matrix that transitions multiply."""
    rows = []
    for row in range(len(query)):
        state, one, outputs = query.new_zeros(4, 4), torch.eye(4, dtype=query.dtype), []
        for q, k, v, beta, log_alpha in zip(
            *(part[row] for part in (query, key, value, strength, log_decay)), strict=True
        ):
            state = state @ (log_alpha.exp() * (one - beta * torch.outer(k, k))) + beta * torch.outer(v, k)
            outputs.append(state @ q)
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (3, 4), (4, 4), (13, 4), (13, 1), (16, 5), (9, 64)])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_gated_delta_rule_by_matrices(tokens, chunk, backwards):
    inputs = delta_inputs(tokens)
    plain = delta_by_matrices(*((part.flip(1) for part in inputs) if backwards else inputs))
    fast = gated_delta_rule(*inputs, chunk=chunk, backwards=backwards)
    same_with_gradients(fast, plain.flip(1) if backwards else plain, inputs)


def test_the_gated_delta_rule_is_that_of_transformers(monkeypatch):
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    monkeypatch.setattr(torch, "float32", torch.float64)
    query, key, value, strength, log_decay = inputs = delta_inputs(37)
    theirs, _ = torch_chunk_gated_delta_rule(
        2 * query[:, :, None],
        key[:, :, None],
        value[:, :, None],
        log_decay[:, :, None],
        strength[:, :, None],
        chunk_size=8,
    )
    same_with_gradients(gated_delta_rule(*inputs, chunk=16), theirs[:, :, 0], inputs)


def attention_projections(biases=True):
    weights = {name: draw(12, 12, seed=seed) for seed, name in enumerate(("query", "key", "value", "out"))}
    return Projections(**weights, **{f"{name}_bias": draw(12, seed=7) for name in weights if biases})


@pytest.mark.parametrize("biases", [True, False])
def test_gated_deltanet_starts_from_the_projections(biases):
    operator, original = build("gated_deltanet"), attention_projections(biases)
    operator.init_from(original)
    for name in ("query", "key", "value", "out"):
        layer, bias = operator.get_submodule(f"{name[0]}_proj"), getattr(original, f"{name}_bias")
        assert torch.equal(layer.weight, getattr(original, name))
        assert torch.equal(layer.bias, torch.zeros(12) if bias is None else bias)


def test_gated_deltanet_of_one_token_is_its_value():
    """What is written in full to an empty state and asked for by its own key comes back as it was."""
    operator, original = build("gated_deltanet"), attention_projections()
    operator.init_from(original)
    operator.k_proj = operator.q_proj
    torch.nn.init.zeros_(operator.b_proj.weight)
    token = draw(1, 1, 12)
    value = token @ original.value.T + original.value_bias
    torch.testing.assert_close(operator(token, Context()), 0.5 * value @ original.out.T + original.out_bias)


def test_gated_deltanet_is_the_mean_of_both_directions():
    one, both = build({"operator": "gated_deltanet", "bidirectional": False}), build("gated_deltanet")
    both.load_state_dict(one.state_dict())
    hidden_states = draw(2, 70, 12)
    back = one(hidden_states.flip(1), Context()).flip(1)
    torch.testing.assert_close(both(hidden_states, Context()), (one(hidden_states, Context()) + back) / 2)


def test_gated_deltanet_adds_few_tensors():
    assert parameters("gated_deltanet") == 5_313_024 + 2 * 16 * 1152 + 2 * 16


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet"])
def test_the_output_layer_is_the_last_step(name):
    """What `dg.closed_form` solves for: zero its weights, and nothing but its bias is left."""
    operator = build(name)
    layer = operator.get_submodule(operator.output_layer)
    torch.nn.init.zeros_(layer.weight)
    expected = torch.zeros(12) if layer.bias is None else layer.bias
    assert torch.equal(operator(draw(1, 5, 12), Context()), expected.double().expand(1, 5, 12))
