"""Watching a model run: hooks that show what the parts of some sites received and gave, and end the forward after the
last.
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
class Call:
    """One call of a part, and its answer.

    Attributes:
        gate: what the block multiplies the answer with (adaLN), where that was asked for.
        context: of the forward it happened in.
    """

    args: tuple
    kwargs: dict[str, Any]
    output: torch.Tensor
    gate: torch.Tensor | None
    context: Context


Visit = Callable[[str, Call], torch.Tensor | None]


class _Enough(Exception):  # noqa: N818  no error: the rest of the forward is of no interest
    pass


class Capture:
    """A model under watch: `run` shows every call of the chosen parts to a visitor.

    What a visitor returns takes the place of the answer, None leaves it. The forward ends after the last chosen part,
    as soon as one has shown their order. Where a part is called twice, or hooks move weights to and fro, it runs to
    its end.
    """

    def __init__(self, model: ModelMixin, graft: Graft):
        self.model, self.graft = model, graft
        self.gates: dict[str, Callable[[], torch.Tensor]] = {}
        self._order: list[str] = []
        self._known = False
        hooked = (
            hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") or isinstance(m, FSDPModule)
            for m in model.modules()
        )
        self._whole = any(hooked)

    def run(self, inputs: dict[str, Any], chosen: Collection[str], visit: Visit) -> None:
        """One forward without gradients, shown at the chosen paths."""
        self._chosen, self._visit = set(chosen), visit
        stop = self._known and not self._whole
        called = self._chosen.intersection(self._order)
        self._last = max(called, key=self._order.index, default=None) if stop else None
        with torch.no_grad(), suppress(_Enough):
            predict(self.model, inputs)
        self._known = True

    @contextmanager
    def hooks(self, *, gated: bool = False) -> Iterator[None]:
        """Capture inside; no trace of it afterwards, whatever happens."""
        with ExitStack() as stack:
            stack.callback(
                self.model.register_forward_pre_hook(ContextReader(self.graft, self.model), with_kwargs=True).remove
            )
            for path, last in {edit.site.path: edit.site.paths[-1] for edit in self.graft.plan.edits}.items():
                told = self._told(path, stack) if last != path else None
                module = self.model.get_submodule(last)
                stack.callback(module.register_forward_hook(self._hook(path, told), with_kwargs=True).remove)
                if gated:
                    self.gates[path] = _gate(self.model, path, stack)
            yield

    def _told(self, path: str, stack: ExitStack) -> list[tuple[tuple, dict]]:
        """What the first of several blocks is given, for the last of them to show beside its answer."""
        told: list[tuple[tuple, dict]] = []

        def hear(module: nn.Module, args: tuple, kwargs: dict) -> None:
            told[:] = [(args, kwargs)]

        stack.callback(self.model.get_submodule(path).register_forward_pre_hook(hear, with_kwargs=True).remove)
        return told

    def _hook(self, path: str, told: list[tuple[tuple, dict]] | None) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
            if told is not None:
                ((args, kwargs),) = told
            if not self._known:
                self._whole |= path in self._order
                self._order.append(path)
            if path not in self._chosen:
                return None
            gate = self.gates[path]() if path in self.gates else None
            answer = self._visit(path, Call(args, kwargs, output, gate, self.graft.slot.current))
            if path == self._last:
                raise _Enough
            return answer

        return hook


def _gate(model: ModelMixin, path: str, stack: ExitStack) -> Callable[[], torch.Tensor]:
    """What the block of a part will multiply its answer with in the running forward, [B, 1, D], heard by hooks."""
    parent, _, name = path.rpartition(".")
    block, heard = model.get_submodule(parent), {}
    if not isinstance(block, BasicTransformerBlock) or block.norm_type not in ("ada_norm_zero", "ada_norm_single"):
        raise TrainingError(
            f"gated=True needs to know the gate of {path}, and only blocks with adaLN as in DiT and PixArt are known. "
            "Leave it False, or leave this site out."
        )
    which = {"attn1": 0, "ff": 1}.get(name)
    if which is None:  # cross-attention passes no gate
        return lambda: torch.ones((), device=model.device)
    if block.norm_type == "ada_norm_zero":

        def hear(module: nn.Module, args: tuple, output: tuple) -> None:
            heard["gate"] = (output[1], output[4])[which].unsqueeze(1)

        stack.callback(block.norm1.register_forward_hook(hear).remove)
    else:

        def hear_single(module: nn.Module, args: tuple, kwargs: dict) -> None:
            step = kwargs["timestep"]
            table = block.scale_shift_table[None] + step.reshape(len(step), 6, -1)
            heard["gate"] = table.chunk(6, dim=1)[(2, 5)[which]]

        stack.callback(block.register_forward_pre_hook(hear_single, with_kwargs=True).remove)
    return lambda: heard["gate"]
