"""Faster ways to compute an operator, where a machine has them; plain torch is always there, and the default.

`backend="torch"` never changes by itself. A backend asked for by name runs, or is an error that says what is missing.
`backend="auto"` takes the fastest of those that this device and precision allow and that agree with plain torch. It
measures them in the first forward of a class of shapes, says once what it chose, and keeps to it while the process
lives, so that a graft that is loaded again after it computes the same bits. In another process, or in code that was
compiled before, two that are about as fast may
come in first by turns, and their results differ by rounding: what must be the same everywhere names its backend.
"""

from __future__ import annotations

import functools
import importlib
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.benchmark import Timer

from ...core.context import Context, Grid
from ...core.sites import AttentionSite
from ...errors import MissingDependencyError, OperatorError, UnknownNameError
from ..base import Mixer, Operator, OperatorConfig

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

# The largest relative difference to plain torch, in half precision, with which a backend is right.
TOLERANCE = 0.03

# Times within this factor of the best are a tie, which the backend that is listed first wins.
TIE = 1.05

SECONDS = 0.05  # for which each backend is measured


def _serves_all(config: Any) -> None:
    return None


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
        refuses: returns why it does not compute what a config asks for, or None.
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
    refuses: Callable[[Any], str | None] = _serves_all
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
        backend = self._named(config.backend)
        if backend is not None:
            reason = backend.refuses(config)
            if reason is not None:
                raise OperatorError(
                    f'{self.name}: backend {config.backend!r} was asked for, but {reason}. Choose backend="torch".'
                )
            _import(backend, self.name)

    def in_torch(self, *inputs_and_context: Any) -> torch.Tensor:
        raise OperatorError(f"{self.name} has no way in plain torch: define in_torch.")

    def forward(self, *inputs: Any, context: Context | None = None) -> torch.Tensor:
        tensors = list(inputs)
        if context is None:
            # It comes last, by name or not.
            context = tensors.pop()
        assert context is not None
        return self.run_by(self.backend_for(tensors, context), tensors, context)

    def run_by(self, backend: Backend | None, tensors: Sequence[torch.Tensor], context: Context) -> torch.Tensor:
        """Compute by a backend; None is plain torch."""
        if backend is None:
            return self.in_torch(*tensors, context)
        if backend.casts_inputs:
            # A kernel knows nothing of autocast, which would lower its tensors as it lowers torch's products.
            tensors = [tensor.to(compute_dtype(tensor)) for tensor in tensors]
        return backend.run(self, *tensors, context)

    def backend_for(self, inputs: Sequence[torch.Tensor], context: Context) -> Backend | None:
        """Choose the backend of this forward; None means plain torch.

        Raises `OperatorError` where the one asked for by name cannot run.
        """
        name = self.config.backend
        if name == "torch":
            return None
        is_for_torch = self.is_for_torch(inputs, context)
        if is_for_torch and name == "auto":
            return None
        if is_for_torch:
            raise OperatorError(
                f"{self.name}: backend {name!r} was asked for, but it knows neither masks nor keys of text. "
                'Choose "torch" or "auto".'
            )
        # Inputs of one call have one device and one precision.
        like = inputs[0]
        dtype = compute_dtype(like)
        grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *self.parameters()))
        if name == "auto":
            return self._choose(inputs, context, dtype, grad)
        backend = self._named(name)
        assert backend is not None
        obstacle = backend.obstacle(like.device.type, dtype, grad)
        if obstacle:
            raise OperatorError(
                f'{self.name}: backend {name!r} was asked for, but {obstacle}. Choose "torch" or "auto".'
            )
        return backend

    def is_for_torch(self, inputs: Sequence[torch.Tensor], context: Context) -> bool:
        """Return whether plain torch alone computes this call, as where kernels know no masks."""
        return False

    def _named(self, name: str) -> Backend | None:
        for backend in self.backends:
            if backend.name == name:
                return backend
        return None

    def _choose(
        self, inputs: Sequence[torch.Tensor], context: Context, dtype: torch.dtype, grad: bool
    ) -> Backend | None:
        """Return the backend of `"auto"`, measured where nothing is known of this class of shapes."""
        *_, tokens, width = inputs[0].shape
        device = inputs[0].device.type
        lengths: tuple[int, ...] = (tokens,)
        if context.grid is not None:
            lengths = (tokens, context.grid.frames, context.grid.height, context.grid.width)
        if torch.compiler.is_compiling():
            lengths = tuple(map(specialize, lengths))
            # By name: compiled code takes no constants of a class of ours.
            return self._named(self.constant(_recall, self.settings, lengths, width, device, dtype, grad))
        candidates = _candidates(self.config, device, dtype, grad)
        if not candidates:
            return None
        key = (self.config, _class_of(lengths), width, device, dtype, grad)
        if key not in _chosen and _can_measure(device):
            _chosen[key] = _measure(self, candidates, inputs, context, dtype, grad)
        return _chosen.get(key)


def has_mask_or_others(inputs: Sequence[torch.Tensor], context: Context) -> bool:
    """Return whether a mask hides keys, or keys of other tokens stand behind the queries' own."""
    return context.mask is not None or inputs[1].shape[2] != inputs[0].shape[2]


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


# What "auto" has measured: a config and a class of shapes -> the fastest backend, None for plain torch.
_chosen: dict[tuple[Any, ...], Backend | None] = {}


def _class_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Return what numbers up to the same power of two have in common."""
    return tuple((length - 1).bit_length() for length in lengths)


def _candidates(config: WithBackends.Config, device: str, dtype: torch.dtype, grad: bool) -> list[Backend]:
    backends = [backend for backend in config.owner.backends if device in backend.pays_on]
    backends = [backend for backend in backends if backend.refuses(config) is None]
    return [backend for backend in backends if not backend.obstacle(device, dtype, grad)]


def _can_measure(device: str) -> bool:
    """Return whether this forward is an ordinary one: not counted, pretended or recorded."""
    if is_in_torch_dispatch_mode():
        return False
    return device != "cuda" or not torch.cuda.is_current_stream_capturing()


def _recall(
    config: WithBackends.Config, lengths: tuple[int, ...], width: int, device: str, dtype: torch.dtype, grad: bool
) -> str:
    """Return the name of what was measured, for compiled code; where nothing was, of the first that is right."""
    key = (config, _class_of(lengths), width, device, dtype, grad)
    if key in _chosen:
        return _name(_chosen[key])
    for backend in _candidates(config, device, dtype, grad):
        if _is_right(backend, config, _is_video(lengths), width, device, dtype, grad):
            return backend.name
    return "torch"


def _name(backend: Backend | None) -> str:
    return backend.name if backend else "torch"


def _is_video(lengths: tuple[int, ...]) -> bool:
    return len(lengths) > 1 and lengths[1] > 1


def _measure(
    operator: WithBackends,
    candidates: list[Backend],
    inputs: Sequence[torch.Tensor],
    context: Context,
    dtype: torch.dtype,
    grad: bool,
) -> Backend | None:
    """Time the backends that are right, and plain torch, on tensors like the inputs; the fastest is logged."""
    like = inputs[0]
    device = like.device.type
    is_video = context.grid is not None and context.grid.frames > 1
    case = (operator.config, is_video, like.shape[-1], device, dtype, grad)
    rivals: list[Backend | None] = [backend for backend in candidates if _is_right(backend, *case)]
    rivals.append(None)
    seconds = [0.0]
    if len(rivals) > 1:
        seconds = [_time(operator, rival, inputs, context, grad) for rival in rivals]
    limit = TIE * min(seconds)
    choice, taken = next(pair for pair in zip(rivals, seconds, strict=True) if pair[1] <= limit)
    share = f", {taken / seconds[-1]:.2f} of the time of plain torch" if choice else ""
    logger.warning("%s: backend %s on %s, %s%s", operator.name, _name(choice), device, dtype, share)
    return choice


def _time(
    operator: WithBackends,
    backend: Backend | None,
    inputs: Sequence[torch.Tensor],
    context: Context,
    grad: bool,
) -> float:
    """Return the seconds of a forward, in training with its backward; infinite for a backend that cannot run it."""
    like = inputs[0]
    generator = torch.Generator(like.device).manual_seed(0)

    def step() -> None:
        output = operator.run_by(backend, drawn, context)
        if grad:
            torch.autograd.grad(output.sum(), trained, allow_unused=True)

    with _apart():
        drawn = [torch.empty_like(part).normal_(generator=generator).requires_grad_(grad) for part in inputs]
        trained = [*drawn, *(parameter for parameter in operator.parameters() if parameter.requires_grad)]
        timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        with torch.set_grad_enabled(grad):
            try:
                return timer.blocked_autorange(min_run_time=SECONDS).median
            except Exception as problem:  # memory that is not there, among others
                if backend is None:
                    raise
                logger.debug("%s: backend %s cannot run here: %s", operator.name, backend.name, problem)
                return float("inf")


@contextmanager
def _apart() -> Iterator[None]:
    """Compute beside a forward that is under way, without leaving a trace in it."""
    # Hooks of gradient checkpointing would count what is saved here as the forward's own.
    nothing = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), nothing:
        yield


@functools.cache
def _is_right(
    backend: Backend,
    config: WithBackends.Config,
    is_video: bool,
    width: int,
    device: str,
    dtype: torch.dtype,
    grad: bool,
) -> bool:
    """Return whether a backend is there and agrees with plain torch on a small example."""
    owner = config.owner
    try:
        _import(backend, owner.name)
        grid = Grid(frames=4, height=24, width=24) if is_video else Grid(height=48, width=48)
        error = _disagreement(backend, config, grid, width, device, dtype, grad)
    except Exception as problem:  # a kernel that cannot run this shape is no reason to stop
        logger.debug("%s: backend %s cannot run here: %s", owner.name, backend.name, problem)
        return False
    if error < TOLERANCE:
        return True
    logger.warning("%s: backend %s differs from plain torch by %.2g and is not used", owner.name, backend.name, error)
    return False


def _disagreement(
    backend: Backend,
    config: WithBackends.Config,
    grid: Grid,
    width: int,
    device: str,
    dtype: torch.dtype,
    grad: bool,
) -> float:
    """Return the largest relative difference to plain torch, of outputs and, in training, of gradients."""
    site = AttentionSite(kind="self_attention", index=0, path="example", width=2 * width, heads=2, head_width=width)
    context = Context(grid=grid)
    shape = (1, grid.tokens, 2 * width)
    count = 1
    if issubclass(config.owner, Mixer):
        shape = (1, 2, grid.tokens, width)
        count = 3
    # Drawn on the CPU: the same numbers for every device.
    generator = torch.Generator().manual_seed(0)
    # Autocast may be on around the forward that asks; the example has its precision already.
    with _apart(), torch.enable_grad(), torch.autocast(device, enabled=False):
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
