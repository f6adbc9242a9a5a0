"""Faster ways to compute an operator, where a machine has them; plain torch is always there, and the default.

`backend="torch"` never changes by itself. A backend asked for by name runs, or is an error that says what is missing.
`backend="auto"` takes the first that this device and precision allow and that agrees with plain torch on a small
example, and says once what it chose.
"""

from __future__ import annotations

import functools
import importlib
import logging
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ...core.context import Context, Grid
from ...core.sites import AttentionSite
from ...errors import MissingDependencyError, OperatorError, UnknownNameError
from ..base import Mixer, Operator, OperatorConfig

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """A faster way to compute an operator, with the same results up to rounding.

    Attributes:
        name: what `backend=` takes.
        run: called as `run(operator, *inputs, context)`.
        module: what it imports.
        dtypes: precisions it computes in; all if empty.
        runs_on, trains_on: device types of its forward and of its backward.
        pays_on: device types on which `"auto"` considers it.
        flag: attribute of its package that says whether its kernels are there; packages without one have them.
        casts_inputs: whether its inputs are cast to what autocast computes in; not where torch's own operations do it.
    """

    name: str
    run: Callable[..., torch.Tensor]
    module: str
    dtypes: tuple[torch.dtype, ...] = HALF
    runs_on: tuple[str, ...] = ("cuda",)
    trains_on: tuple[str, ...] = ("cuda",)
    pays_on: tuple[str, ...] = ("cuda",)
    flag: str = ""
    casts_inputs: bool = True

    def obstacle(self, device: str, dtype: torch.dtype, grad: bool) -> str | None:
        """Return the reason why it cannot run there, or None."""
        if device not in self.runs_on:
            return f"it runs on {' and '.join(self.runs_on)}, and the tensors are on {device}"
        if self.dtypes and dtype not in self.dtypes:
            return f"it computes in {', '.join(map(str, self.dtypes))}, and the tensors are {dtype}"
        if grad and device not in self.trains_on:
            return f"it has no backward on {device}"
        return None


class WithBackends(Operator):
    """An operator that has faster ways; `in_torch`, with the signature of `forward`, is always there."""

    backends: tuple[Backend, ...] = ()

    @dataclass(frozen=True, kw_only=True)
    class Config(OperatorConfig):
        """Settings of every such operator.

        Attributes:
            backend: `torch`, `auto`, or the name of a faster way.
        """

        owner: ClassVar[type[WithBackends]]

        backend: str = "torch"

        def __post_init__(self):
            super().__post_init__()
            names = ("torch", "auto", *(backend.name for backend in self.owner.backends))
            if self.backend not in names:
                raise UnknownNameError(f"backend of {self.owner.name}", self.backend, names)

    def __init__(self, config, site):
        super().__init__(config, site)
        for backend in self.backends:
            if backend.name == config.backend:
                _import(backend, self.name)

    def in_torch(self, *inputs_and_context: Any) -> torch.Tensor:
        raise OperatorError(f"{self.name} has no way in plain torch: define in_torch.")

    def forward(self, *inputs: Any, context: Context | None = None) -> torch.Tensor:
        tensors = list(inputs)
        if context is None:
            # It comes last, by name or not.
            context = tensors.pop()
        backend = self.backend_for(*tensors)
        if backend is None:
            return self.in_torch(*tensors, context)
        if backend.casts_inputs:
            # A kernel knows nothing of autocast, which would lower its tensors as it lowers torch's products.
            tensors = [tensor.to(compute_dtype(tensor)) for tensor in tensors]
        return backend.run(self, *tensors, context)

    def backend_for(self, *inputs: torch.Tensor) -> Backend | None:
        """Choose the backend of this forward; None means plain torch.

        Raises `OperatorError` where the one asked for by name cannot run.
        """
        name = self.config.backend
        if name == "torch":
            return None
        # Inputs of one call have one device and one precision.
        like = inputs[0]
        dtype = compute_dtype(like)
        grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *self.parameters()))
        if name == "auto":
            return self.constant(_best, self.settings, like.shape[-1], like.device.type, dtype, grad)
        backend = next(backend for backend in self.backends if backend.name == name)
        obstacle = backend.obstacle(like.device.type, dtype, grad)
        if obstacle:
            raise OperatorError(
                f'{self.name}: backend {name!r} was asked for, but {obstacle}. Choose "torch" or "auto".'
            )
        return backend


def runs_in_pieces(like: torch.Tensor) -> bool:
    """Return whether plain torch takes tokens a few at a time, which stay in cache.

    It does on CPUs, where nothing is saved for a backward pass and nothing is compiled.
    """
    return like.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def specialize(number: int) -> int:
    """Return a plain number where code compiled for changing sizes has a symbol: it is compiled anew for another."""
    return len([None] * number)


def autocast_device(like: torch.Tensor) -> str:
    """Return the device type whose autocast concerns a tensor; there is none for tensors without memory."""
    return "cpu" if like.is_meta else like.device.type


def compute_dtype(like: torch.Tensor) -> torch.dtype:
    """Return the precision of torch's products of a tensor: autocast's where that is on, else its own."""
    device = autocast_device(like)
    if torch.is_autocast_enabled(device) and like.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return like.dtype


def _in_compiled_torch(operator: WithBackends, *inputs_and_context: Any) -> torch.Tensor:
    # Under a counter, as in every save, torch would compile nothing, and never again.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return operator.in_torch(*inputs_and_context)
    from torch._dynamo.exc import FailOnRecompileLimitHit  # takes a second to import

    try:
        return _compiled(operator.config)(operator, *inputs_and_context)
    except FailOnRecompileLimitHit as error:
        raise OperatorError(
            f"{operator.name}: torch compiles one operator for so many shapes, precisions and modes of training as "
            'torch._dynamo.config.recompile_limit says, and met one more. Set that limit higher, or choose "torch".'
        ) from error


@functools.cache
def _compiled(config: WithBackends.Config) -> Callable[..., torch.Tensor]:
    """Compile the code of an operator, once for all layers of one config."""
    # A copy for each config, since torch counts how often it has compiled a piece of code.
    source = config.owner.in_torch
    copy = types.FunctionType(
        source.__code__.replace(), source.__globals__, source.__name__, source.__defaults__, source.__closure__
    )
    return torch.compile(copy, fullgraph=True, dynamic=False)


# One kernel of many small ones. "auto" leaves it alone: compiling takes seconds for every shape.
COMPILED = Backend(
    "compiled",
    _in_compiled_torch,
    "torch.compiler",
    dtypes=(),
    runs_on=("cuda", "cpu"),
    trains_on=("cuda", "cpu"),
    pays_on=(),
    casts_inputs=False,
)


def _import(backend: Backend, operator: str) -> None:
    """Import the exact module it runs, since some packages import without what they need."""
    try:
        importlib.import_module(backend.module)
        package = importlib.import_module(backend.module.partition(".")[0])
        if not getattr(package, backend.flag, True):
            # It would run another way, a thousand times slower.
            raise ImportError(f"{package.__name__} has been installed without its kernels: {backend.flag} is False.")
    except Exception as error:  # kernels fail in many ways where there is no device or compiler for them
        needs = backend.module.partition(".")[0]
        raise MissingDependencyError(f"Backend {backend.name!r} of {operator}", needs, extra="kernels") from error


def _best(config: WithBackends.Config, *case: Any) -> Backend | None:
    return _find_best(config, *case)


@functools.cache
def _find_best(config: WithBackends.Config, width: int, device: str, dtype: torch.dtype, grad: bool) -> Backend | None:
    """Return the first backend that is there, allowed and right; logged once, since the answer is cached."""
    owner = config.owner
    for backend in owner.backends:
        if device not in backend.pays_on or backend.obstacle(device, dtype, grad):
            continue
        try:
            _import(backend, owner.name)
            error = _disagreement(backend, config, width, device, dtype, grad)
        except Exception as problem:  # a kernel that cannot run this shape is no reason to stop
            logger.debug("%s: backend %s cannot run here: %s", owner.name, backend.name, problem)
            continue
        if error < 0.03:
            logger.warning("%s: backend %s on %s, %s", owner.name, backend.name, device, dtype)
            return backend
        logger.warning(
            "%s: backend %s differs from plain torch by %.2g and is not used", owner.name, backend.name, error
        )
    logger.warning("%s: backend torch on %s, %s", owner.name, device, dtype)
    return None


def _disagreement(
    backend: Backend, config: WithBackends.Config, width: int, device: str, dtype: torch.dtype, grad: bool
) -> float:
    """Return the largest relative difference to plain torch, of outputs and, in training, of gradients."""
    site = AttentionSite(kind="self_attention", index=0, path="example", width=2 * width, heads=2, head_width=width)
    context = Context(grid=Grid(height=48, width=48))
    shape = (1, 48 * 48, 2 * width)
    count = 1
    if issubclass(config.owner, Mixer):
        shape = (1, 2, 48 * 48, width)
        count = 3
    # Drawn on the CPU: the same numbers for every device.
    generator = torch.Generator().manual_seed(0)
    device_type = torch.device(device).type
    # Autocast may be on around the forward that asks; the example has its precision already.
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device_type, enabled=False),
    ):
        operator = replace(config, backend="torch").build(site).to(device, dtype)
        drawn = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count + 1)]
        inputs = [tensor.requires_grad_(grad) for tensor in drawn[:-1]]
        results = []
        for call in (operator, functools.partial(backend.run, operator)):
            output = call(*inputs, context)
            gradients = torch.autograd.grad((output * drawn[-1]).sum(), inputs) if grad else ()
            results.append([output, *gradients])
    errors = []
    for one, other in zip(*results, strict=True):
        expected = one.detach().double()
        error = (expected - other.detach().double()).norm() / expected.norm().clamp(min=1e-12)
        errors.append(error.item())
    return max(errors)
