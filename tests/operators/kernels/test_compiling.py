"""Kernels compile for a GPU that is not there."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffusers_graft.operators.kernels import block_sparse, gated_convolution

CONSTANTS = dict(TAPS=(4, 1, 3, 0), TOKENS=32, CHANNELS=64, width=1, FEATURISED=True, INNER=True, TILE=64, WIDTH=128)
KINDS = dict(scale="fp32", bias="*fp32", filters="*fp32", sums="*fp32", log_sums="*fp32", inner="*fp32")
KINDS |= dict.fromkeys(("chosen", "choosers", "counts"), "*i32")
NUMBERS = ("sample_stride", "stride", "height", "channels", "blocks", "size", "width", "most_chosen", "most_choosers")
KINDS |= dict.fromkeys(NUMBERS, "i32")

kernels = [gated_convolution._forward, gated_convolution._backward_gates, gated_convolution._backward_features]
kernels += [block_sparse._forward, block_sparse._backward_query, block_sparse._backward_key]
for kernel in kernels:
    names = kernel.arg_names
    chosen = {name: CONSTANTS[name] for name in names if name in CONSTANTS}
    kinds = {name: "constexpr" if name in chosen else KINDS.get(name, "*bf16") for name in names}
    source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in chosen.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert "ld.global" in made.asm["ptx"], kernel
"""


@pytest.mark.long
def test_kernels_compile_for_a_gpu():
    """In a process of its own, where Triton does not interpret: its compiler needs no device."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=environment)
