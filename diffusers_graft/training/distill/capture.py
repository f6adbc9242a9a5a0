"""Capture of inputs and outputs: hooks on the original parts of a running model, which end its forward after the last.

Paper: arXiv 2506.05340, section 3.1, where activations are captured to files; here they are used as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ...core.context import Context
from ...errors import TrainingError
from ...injection.graft import Graft
from ...injection.install import ContextReader
from ...inspection import predict


@dataclass(frozen=True)
class CapturedCall:
    """One call of a part.

    Attributes:
        args, kwargs: its inputs.
        output: its output, [B, N, D], or a tuple of a block's streams.
        gate: factor of the block on this output (adaLN), [B, 1, D], where it was asked for.
        context: of the forward it happened in.
    """

    args: tuple
    kwargs: dict[str, Any]
    output: torch.Tensor
    gate: torch.Tensor | None
    context: Context


# Takes the path of a part and a call of it; an output that it returns replaces the part's.
Visitor = Callable[[str, CapturedCall], torch.Tensor | None]


# Places of the gates of self-attention and feed-forward: among the outputs of DiT's norm, and in PixArt's table.
_GATES = {"attn1": (1, 2), "ff": (4, 5)}


class _LastSiteReached(Exception):  # noqa: N818
    """Ends a forward whose rest is not needed; no error."""


class Capture:
    """Hooks on the parts of a model that a graft replaces.

    The forward ends after the last part that is captured, once a first forward has shown the order of the parts. It
    runs to its end where a part is called twice, or where other hooks move weights between devices.
    """

    def __init__(self, model: ModelMixin, graft: Graft):
        self.model = model
        self.graft = graft
        self.gates: dict[str, Callable[[], torch.Tensor]] = {}
        self._order: list[str] = []
        self._order_is_known = False
        # Ending a forward early would skip hooks that move weights back.
        self._runs_to_end = any(_moves_weights(module) for module in model.modules())
        self._paths: set[str] = set()
        self._last: str | None = None
        self._visit: Visitor = lambda path, call: None

    def run(self, inputs: dict[str, Any], paths: Collection[str], visit: Visitor) -> None:
        """Run one forward without gradients, and call `visit` at the parts of these paths."""
        self._paths = set(paths)
        self._visit = visit
        self._last = None
        if self._order_is_known and not self._runs_to_end:
            called = self._paths.intersection(self._order)
            self._last = max(called, key=self._order.index, default=None)
        # The teacher learns nothing, so its activations are freed as it runs.
        with torch.no_grad(), suppress(_LastSiteReached):
            predict(self.model, inputs)
        self._order_is_known = True

    def pause(self) -> None:
        """Let forwards of others go by until the next `run`."""
        self._paths = set()
        self._last = None

    @contextmanager
    def hooks(self, *, gated: bool = False) -> Iterator[None]:
        """Install the hooks inside, and remove them afterwards.

        Args:
            gated: capture the gates of the blocks too.

        Raises `TrainingError` for gates of a block that is not known.
        """
        with ExitStack() as stack:
            reader = ContextReader(self.graft, self.model)
            stack.callback(self.model.register_forward_pre_hook(reader, with_kwargs=True).remove)
            for edit in self.graft.plan.edits:
                first = edit.site.path
                last = edit.site.paths[-1]
                # The output of several blocks is the last one's, their input the first one's.
                inputs = None if first == last else self._capture_inputs(first, stack)
                module = self.model.get_submodule(last)
                stack.callback(module.register_forward_hook(self._make_hook(first, inputs), with_kwargs=True).remove)
                if gated:
                    self.gates[first] = _capture_gate(self.model, first, stack)
            yield

    def _capture_inputs(self, path: str, stack: ExitStack) -> list[tuple[tuple, dict]]:
        """Return a list that holds the inputs of the last call of a block."""
        captured: list[tuple[tuple, dict]] = []

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            captured[:] = [(args, kwargs)]

        stack.callback(self.model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
        return captured

    def _make_hook(self, path: str, inputs: list[tuple[tuple, dict]] | None) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
            if inputs is not None:
                ((args, kwargs),) = inputs
            if not self._order_is_known:
                # A part that is called twice has no last call that is known beforehand.
                self._runs_to_end |= path in self._order
                self._order.append(path)
            if path not in self._paths:
                return None
            gate = self.gates[path]() if path in self.gates else None
            call = CapturedCall(args, kwargs, output, gate, self.graft.slot.current)
            replacement = self._visit(path, call)
            if path == self._last:
                raise _LastSiteReached
            return replacement

        return hook


def _moves_weights(module: nn.Module) -> bool:
    """Return whether hooks that move weights between devices or processes run around a module."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") or isinstance(module, FSDPModule)


def _capture_gate(model: ModelMixin, path: str, stack: ExitStack) -> Callable[[], torch.Tensor]:
    """Return a function that gives the factor of a block on a part's output in the running forward, [B, 1, D]."""
    parent, _, name = path.rpartition(".")
    block = model.get_submodule(parent)
    if not isinstance(block, BasicTransformerBlock) or block.norm_type not in ("ada_norm_zero", "ada_norm_single"):
        raise TrainingError(
            f"gated=True needs to know the gate of {path}, and only blocks with adaLN as in DiT and PixArt are known. "
            "Leave it False, or leave this site out."
        )
    if name not in _GATES:
        # The output of cross-attention passes no gate.
        return lambda: torch.ones((), device=model.device)
    norm_place, table_place = _GATES[name]
    captured: dict[str, torch.Tensor] = {}

    def capture_norm(module: nn.Module, args: tuple, output: tuple) -> None:
        captured["gate"] = output[norm_place].unsqueeze(1)

    def capture_timestep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = kwargs["timestep"]
        table = block.scale_shift_table[None] + timestep.reshape(len(timestep), 6, -1)
        captured["gate"] = table.chunk(6, dim=1)[table_place]

    if block.norm_type == "ada_norm_zero":
        stack.callback(block.norm1.register_forward_hook(capture_norm).remove)
    else:
        stack.callback(block.register_forward_pre_hook(capture_timestep, with_kwargs=True).remove)
    return lambda: captured["gate"]
