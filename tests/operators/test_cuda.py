"""Every operator on a GPU: as on the CPU, in bf16, compiled, by every backend; forward and gradients. Skipped without
one.
"""

import pytest
import torch

from diffusers_graft.core.context import Grid
from diffusers_graft.core.sites import AttentionSite
from diffusers_graft.operators import configure
from diffusers_graft.operators.conformance.case import Subject, gradients, in_context
from diffusers_graft.operators.conformance.suite import example_site

from .conformance.test_suite import CASES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BACKENDS = [
    *({"operator": "sliding_window", "backend": name} for name in ("flash", "varlen", "flex", "auto")),
    *({"operator": "neighborhood", "kernel": 5, "backend": name} for name in ("natten", "flex", "auto")),
    *({"operator": "neighborhood", "kernel": 6, "stride": 2, "backend": name} for name in ("natten", "flex")),
    *({"operator": name, "backend": "triton"} for name in ("hyena_x", "hyena_se", "hyena_y")),
    *(
        {"operator": "block_sparse", "block": 4, "keep": 2, "gate": gate, "backend": "triton"}
        for gate in (None, "token")
    ),
    *({"operator": name, "backend": "compiled"} for name in ("hyena_x", "hyena_se", "linear_attention", "ttt")),
    *(
        {"operator": name, "backend": "auto"}
        for name in ("hyena_x", "hyena_se", "hyena_y", "mamba2", "gated_deltanet")
    ),
]


def subject_of(case):
    config = configure(case)
    return Subject(config, example_site(config.owner.kinds[0])).accepted()[0]


def on_gpu(subject, dtype):
    return subject.build().to("cuda", dtype), [tensor.to("cuda") for tensor in subject.inputs(dtype=dtype)]


def error(one, other):
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return ((one - other).norm() / other.norm().clamp(min=1e-3)).item()


def require_same(found, wanted, tolerance, gradient_tolerance):
    """Two outputs of `gradients` agree."""
    (output, found), (expected, wanted) = found, wanted
    assert error(output, expected) < tolerance
    for gradient, want in zip(found, wanted, strict=True):
        assert (gradient is None) == (want is None)
        assert gradient is None or error(gradient, want) < gradient_tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_on_the_cpu(case):
    subject = subject_of(case)
    operator, inputs = on_gpu(subject, torch.float32)
    precise = subject.build()
    expected = gradients(precise, precise, subject.inputs(), subject.context)
    require_same(gradients(operator, operator, inputs, subject.context), expected, 1e-3, 1e-2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_bf16_and_compiled(case):
    subject = subject_of(case)
    operator, inputs = on_gpu(subject, torch.bfloat16)
    expected = gradients(operator, operator, inputs, subject.context)
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True)
    require_same(gradients(compiled, operator, inputs, subject.context), expected, 0.05, 0.1)
    with torch.no_grad():
        assert error(compiled(*in_context(operator, inputs, subject.context)), expected[0]) < 0.05


@pytest.mark.parametrize("case", BACKENDS, ids=str)
def test_backends_agree_with_plain_torch(case):
    # Kernels take heads of at least 16 channels; 72 are PixArt's.
    site = AttentionSite(kind="self_attention", index=0, path="attn", width=144, heads=2, head_width=72)
    subject = Subject(configure({**case, "backend": "torch"}), site, Grid(height=16, width=24))
    try:
        fast = configure(case).resolved(subject.site).build(subject.site)
    except ImportError as missing:
        pytest.skip(str(missing))
    operator, inputs = on_gpu(subject, torch.bfloat16)
    fast.to("cuda", torch.bfloat16).load_state_dict(operator.state_dict())
    expected = gradients(operator, operator, inputs, subject.context)
    require_same(gradients(fast, fast, inputs, subject.context), expected, 0.05, 0.1)
