"""Kernels that torch cannot compile along: in compiled code each is one operation whose inside stays closed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch


def call_kernel(kernel: Callable[..., torch.Tensor], *tensors: torch.Tensor, size: int = 0) -> torch.Tensor:
    """Return `kernel(*tensors, size=size)`, also within a full graph.

    In compiled code a backward pass computes the kernel a second time, since nothing of it is kept.

    Args:
        kernel: a function of a module, one `torch.autograd.Function`, whose output is like its first tensor.
        size: a number it needs.
    """
    if not torch.compiler.is_compiling():
        return kernel(*tensors, size=size)
    return _call(f"{kernel.__module__}:{kernel.__name__}", list(tensors), size)


def _find(path: str) -> Callable[..., torch.Tensor]:
    # By name, since compiled code is stored on disk and read by other processes.
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@torch.library.custom_op("diffusers_graft::kernel", mutates_args=())
def _call(path: str, tensors: list[torch.Tensor], size: int) -> torch.Tensor:
    with torch.no_grad():
        return _find(path)(*tensors, size=size)


@_call.register_fake
def _(path, tensors, size):
    return torch.empty_like(tensors[0])


@torch.library.custom_op("diffusers_graft::kernel_backward", mutates_args=())
def _call_backward(path: str, gradient: torch.Tensor, tensors: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        output = _find(path)(*inputs, size=size)
        return list(torch.autograd.grad(output, inputs, gradient))


@_call_backward.register_fake
def _(path, gradient, tensors, size):
    return [torch.empty_like(tensor) for tensor in tensors]


def _save(ctx, inputs, output):
    ctx.path, tensors, ctx.size = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, gradient):
    gradients = _call_backward(ctx.path, gradient.contiguous(), list(ctx.saved_tensors), ctx.size)
    return None, gradients, None


_call.register_autograd(_differentiate, setup_context=_save)
