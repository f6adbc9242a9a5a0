"""One line a case; a registered operator without a line fails."""

import pytest
import torch

from diffusers_graft import check_operator, operators
from diffusers_graft.core.context import Grid
from diffusers_graft.operators import configure
from diffusers_graft.operators.conformance.case import Subject
from diffusers_graft.operators.conformance.suite import example_site

CASES = [
    "self_attention",
    {"operator": "self_attention", "heads": 2},
    "sliding_window",
    {"operator": "sliding_window", "window": (0, 3)},
    {"operator": "sliding_window", "window": (4, 0)},
    {"operator": "sliding_window", "window": (0, 0)},
    {"operator": "sliding_window", "window": (70, 1)},
    {"operator": "sliding_window", "window": (31, 32)},
    "neighborhood",
    {"operator": "neighborhood", "kernel": 1},
    {"operator": "neighborhood", "kernel": 5},
    {"operator": "neighborhood", "kernel": 3, "dilation": 2},
    {"operator": "neighborhood", "kernel": 7, "dilation": 3},
    {"operator": "neighborhood", "kernel": 15},
    {"operator": "neighborhood", "kernel": (1, 3, 3)},
    {"operator": "neighborhood", "kernel": (3, 5, 3)},
    {"operator": "neighborhood", "kernel": 6, "stride": 2},
    {"operator": "neighborhood", "kernel": (3, 5, 6), "stride": (1, 3, 2)},
    {"operator": "neighborhood", "kernel": 7, "shape": "circle"},
    {"operator": "neighborhood", "kernel": 5, "shape": "circle", "far": 4},
    "compressed_linear",
    {"operator": "compressed_linear", "query_conv": False, "stride": 3},
    {"operator": "compressed_linear", "stride": 1, "kernel": 1, "narrow": 2, "text_share": "tokens"},
    "radial",
    {"operator": "radial", "least": 4, "decay": 0.5},
    {"operator": "radial", "least": 8, "sink": False},
    {"operator": "radial", "least": 4, "block": 7},
    "hyena_x",
    {"operator": "hyena_x", "layout": "centered_1d"},
    {"operator": "hyena_x", "layout": "centered_1d", "kernel_size": 2},
    {"operator": "hyena_x", "layout": "centered_1d", "kernel_size": 5},
    {"operator": "hyena_x", "layout": "2d", "kernel_size": 3},
    {"operator": "hyena_x", "layout": "2d"},
    {"operator": "hyena_x", "layout": "3d", "kernel_size": 3},
    {"operator": "hyena_x", "layout": "3d"},
    "hyena_se",
    {"operator": "hyena_se", "layout": "centered_1d", "kernel_size": 3},
    {"operator": "hyena_se", "layout": "2d", "kernel_size": 3},
    {"operator": "hyena_se", "layout": "3d", "kernel_size": 2},
    "hyena_y",
    {"operator": "hyena_y", "layout": "centered_1d"},
    {"operator": "hyena_y", "layout": "2d", "kernel_size": 3},
    {"operator": "hyena_y", "layout": "3d", "kernel_size": 3},
    "identity",
    {"operator": "identity", "output": "zero"},
    "pooled_keys",
    {"operator": "pooled_keys", "stride": 4},
    {"operator": "pooled_keys", "stride": 1},
    "block_sparse",
    {"operator": "block_sparse", "block": 4, "keep": 3},
    {"operator": "block_sparse", "block": (2, 3, 4), "keep": 0.3},
    {"operator": "block_sparse", "block": 4, "keep": 1.0, "mass": 0.5},
    {"operator": "block_sparse", "block": 3, "keep": 0.3, "gate": "channel"},
    {"operator": "block_sparse", "block": 3, "keep": 0.5, "gate": "token"},
    "sparse_linear",
    {"operator": "sparse_linear", "block": (2, 3, 4), "keep": 2, "feature_map": "relu"},
    {"operator": "sparse_linear", "block": 3, "keep": 0.4, "choose": "nearest", "feature_map": "elu"},
    "hybrid",
    {
        "operator": "hybrid",
        "first": "linear_attention",
        "second": {"operator": "neighborhood", "kernel": 5},
        "split": (2, 0),
    },
    {"operator": "hybrid", "first": "hyena_x", "second": "identity", "split": 1},
    {"operator": "hybrid", "first": "block_sparse(block=3, keep=2, gate='token')", "split": 1},
    "linear_attention",
    {"operator": "linear_attention", "feature_map": "relu"},
    {"operator": "linear_attention", "feature_map": "softmax"},
    {"operator": "linear_attention", "value_conv": 3},
    {"operator": "linear_attention", "feature_map": "softmax", "value_conv": 5},
    {"operator": "linear_attention", "feature_map": "mlp"},
    {"operator": "linear_attention", "feature_map": "polynomial", "heads": 2},
    {"operator": "linear_attention", "heads": 1, "value_conv": 3},
    {"operator": "linear_attention", "feature_map": "relu", "rotary": "neighbours"},
    {"operator": "linear_attention", "heads": 2, "rotary": "halves"},
    "ttt",
    {"operator": "ttt", "steps": 3},
    {"operator": "ttt", "steps": 2, "convolution": False},
    "mamba2",
    {"operator": "mamba2", "bidirectional": False},
    {"operator": "mamba2", "scan": "column", "bidirectional": False},
    {"operator": "mamba2", "scan": "zigzag", "chunk": 7, "state": 5, "conv": 3},
    {"operator": "mamba2", "expand": 1, "conv": 1, "head_width": 4},
    "gated_deltanet",
    {"operator": "gated_deltanet", "bidirectional": False},
    {"operator": "gated_deltanet", "chunk": 7},
    {"operator": "gated_deltanet", "decay": "channel", "output_gate": "sigmoid"},
    {
        "operator": "gated_deltanet",
        "bidirectional": False,
        "short_conv": 4,
        "silu": True,
        "output_norm": True,
        "output_gate": "silu",
    },
    "mlp",
    {"operator": "mlp", "expansion": 6},
    {"operator": "mlp", "expansion": 2.5, "activation": "relu"},
    {"operator": "mlp", "activation": "silu"},
    {"operator": "mlp", "activation": "geglu-approximate"},
    "gated_mlp",
    {"operator": "gated_mlp", "expansion": 2.5, "activation": "swiglu"},
    {"operator": "gated_mlp", "expansion": 5, "activation": "sigmoid"},
    "moe_mlp",
    {"operator": "moe_mlp", "experts": 3, "top_k": 3, "expansion": 1.5, "activation": "silu"},
    {"operator": "moe_mlp", "experts": 6, "top_k": 2, "expansion": 2},
    "linear_mlp",
    "low_rank_mlp",
    {"operator": "low_rank_mlp", "rank": 3, "activation": "mish"},
    "mix_ffn",
    {"operator": "mix_ffn", "expansion": 2, "kernel": 5, "activation": "silu"},
    "hyena_mlp",
    {"operator": "hyena_mlp", "expansion": 1.5, "kernel_size": 3, "positions": 1},
    {"operator": "hyena_mlp", "positions": 64},
    "parallel",
    {"operator": "parallel", "residual": False},
    {"operator": "parallel", "init": "random"},
    {"operator": "parallel", "merge": "sum"},
    {"operator": "parallel", "merge": "gated"},
    "remove",
    "linear_block",
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_conforms(case):
    report = check_operator(case)
    assert len(report.passed) >= 17
    assert "flops" in report.passed


@pytest.mark.parametrize("name", ["self_attention", "linear_attention"])
def test_on_cross_attention(name):
    assert "shape_and_dtype" in check_operator(name, kind="cross_attention").passed


@pytest.mark.parametrize("name", ["neighborhood", "sliding_window", "gated_deltanet", "hyena_x"])
def test_compiles_for_changing_sizes(name):
    config = configure(name)
    subject = Subject(config, example_site(config.owner.kinds[0]))
    operator = subject.build()
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, dynamic=True, backend="eager")
    for grid in (Grid(height=12, width=23), Grid(height=20, width=15)):
        inputs, context = subject.on(grid).inputs(batch=1), subject.on(grid).context
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs, context), operator(*inputs, context))


def test_every_operator_has_a_case():
    assert {configure(case).owner.name for case in CASES} == set(operators.available())
