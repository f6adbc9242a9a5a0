"""Parameters and what moves them: optimiser, schedule, clipping, scaling, an average. Both stages step with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError
from .config import TrainingConfig
from .distributed import average_gradients
from .fsdp import full_tensor, gather_state, shard_like, shard_optimizer_state


def mixed(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision on a device, or none.

    Without autocast's cache: weights cast without gradients would be used again with them.
    """
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, kind, enabled=kind is not None, cache_enabled=False)


class StageOptimizer:
    """One optimiser over some parameters.

    A step is: `backward` for every batch of it, `gather` (which tells whether the gradients can be used), `step`.

    Attributes:
        average: exponential moving averages of the parameters, empty where there is no decay.
        done: steps taken.

    Raises `TrainingError` for weights that the precision cannot train.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        config: TrainingConfig,
        *,
        lr_scale: float = 1.0,
        ema_decay: float = 0.0,
    ):
        self.parameters, self.config, self.ema_decay, self.done = list(parameters), config, ema_decay, 0
        if any(parameter.dtype == torch.float16 for parameter in self.parameters):
            raise TrainingError(
                "Weights in float16 cannot be trained, since small steps and gradients are zero there: call "
                'model.to(torch.float32) first, with precision="fp16" or "bf16" for speed.'
            )
        self.lr, self.factor = config.lr * lr_scale, config.lr_factors()
        self.optimizer = config.make_optimizer(self.parameters, self.lr)
        # In float32 at least: to bfloat16, which has three digits, a share of a thousandth would add nothing.
        averaged = self.parameters if ema_decay else []
        self.average = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in averaged]
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=config.precision == "fp16")

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one batch."""
        self.scaler.scale(loss / self.config.accumulate).backward()

    def gather(self) -> torch.Tensor:
        """Gradients averaged over processes and clipped; their norm before that, 0 where the scaler looks after it."""
        average_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        return torch.zeros_like(norm) if self.scaler.is_enabled() else norm.detach()

    def step(self) -> None:
        """Move the parameters, then the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.factor(self.done)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.clear()
        self.done += 1
        if self.average:
            decay = min(self.ema_decay, self.done / (self.done + 9))
            now = [p.detach().to(a.dtype) for p, a in zip(self.parameters, self.average, strict=True)]
            torch._foreach_lerp_(self.average, now, 1 - decay)

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def take(self, values: Sequence[torch.Tensor]) -> None:
        """Set the parameters."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(shard_like(value, parameter))

    def state_dict(self) -> dict[str, Any]:
        """With whole tensors, also where weights are spread over processes; every process has to ask."""
        state = {"parameters": self.parameters, "average": self.average, "optimizer": self.optimizer.state_dict()}
        return {**gather_state(state), "scaler": self.scaler.state_dict(), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.take(state["parameters"])
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(shard_like(saved, average))
        self.optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], self.parameters))
        self.scaler.load_state_dict(state["scaler"])
        self.done = state["done"]
