"""Optimizer of a stage: schedule, clipping, loss scaling, float32 master weights and a moving average."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import TrainingError
from .config import TrainingConfig
from .distributed import average_gradients
from .fsdp import full_tensor, gather_state, shard_like, shard_optimizer_state

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def mixed_precision(device: torch.device, precision: str | None) -> torch.autocast:
    """Return a context of mixed precision on a device, or of none.

    Autocast's cache is off: weights that were cast without gradients would be used again where gradients are needed.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision or "no")
    return torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False)


class StageOptimizer:
    """One optimizer over some parameters.

    A step is: `backward` for every batch of it, `clip_gradients` (whose norm shows whether they can be used), `step`.

    Attributes:
        parameters: of the model.
        masters: the weights that the optimizer moves. Those of parameters in bfloat16 are copies in float32, since
            bfloat16 has three digits and a small step would be rounded away; others are the parameters themselves.
        average: exponential moving average of the masters (diffusers' `EMAModel`), None without a decay.
        steps_done: optimizer steps so far.
        current_lr: learning rate of the last step, without the factors of single parameters.

    Args:
        lr_scale: factor on the learning rate of all parameters.
        lr_scales: factors on that of single parameters; 1 unless given.
        matrices: parameters that Muon moves, where it was chosen.

    Raises `TrainingError` for weights in float16.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        config: TrainingConfig,
        *,
        lr_scale: float = 1.0,
        lr_scales: Mapping[nn.Parameter, float] | None = None,
        matrices: Collection[nn.Parameter] = (),
        ema_decay: float = 0.0,
    ):
        self.parameters = list(parameters)
        self.config = config
        self.steps_done = 0
        if any(parameter.dtype == torch.float16 for parameter in self.parameters):
            raise TrainingError(
                "Weights in float16 cannot be trained, since small steps and gradients are zero there: call "
                'model.to(torch.float32) first, with precision="fp16" or "bf16" for speed.'
            )
        self.masters = [_make_master(parameter) for parameter in self.parameters]
        assert config.lr is not None  # a stage knows the width of its model
        self.lr = config.lr * lr_scale
        self.lr_factor = config.lr_factors()
        self.current_lr = self.lr
        groups = self._make_groups(lr_scales or {}, matrices if config.optimizer == "Muon" else ())
        self.optimizer = config.make_optimizer(groups, self.lr)
        self.average: EMAModel | None = None
        if ema_decay:
            from diffusers.training_utils import EMAModel  # brings all models of diffusers

            self.average = EMAModel(self.masters, decay=ema_decay, foreach=True)
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=config.precision == "fp16")

    def _make_groups(
        self, lr_scales: Mapping[nn.Parameter, float], matrices: Collection[nn.Parameter]
    ) -> list[dict[str, Any]]:
        """Return the masters in groups of one factor and one optimizer, in their order."""
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            key = (lr_scales.get(parameter, 1.0), parameter in matrices)
            groups.setdefault(key, []).append(master)
        return [
            {"params": masters, "lr_scale": scale, "is_matrix": is_matrix}
            for (scale, is_matrix), masters in groups.items()
        ]

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one batch."""
        self.scaler.scale(loss / self.config.accumulate).backward()
        for parameter, master in self._copies():
            if parameter.grad is None:
                continue
            # Accumulated in float32, where small gradients are not lost beside large ones.
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad += parameter.grad.float()
            parameter.grad = None

    def clip_gradients(self) -> torch.Tensor:
        """Average gradients over processes and clip them; returns their norm before that.

        The norm is 0 where the loss is scaled, since the scaler looks after gradients that are not finite.
        """
        average_gradients(self.masters)
        self.scaler.unscale_(self.optimizer)
        norm = full_tensor(nn.utils.clip_grad_norm_(self.masters, self.config.max_grad_norm))
        if self.scaler.is_enabled():
            return torch.zeros_like(norm)
        return norm.detach()

    def step(self) -> None:
        """Move the weights, then their average."""
        # Set rather than scheduled, so that a resumed run needs no scheduler's state.
        self.current_lr = self.lr * self.lr_factor(self.steps_done)
        for group in self.optimizer.param_groups:
            # Checkpoints of earlier versions have no factors.
            group["lr"] = self.current_lr * group.get("lr_scale", 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.clear_gradients()
        self._copy_masters()
        self.steps_done += 1
        if self.average is not None:
            self.average.step(self.masters)

    def clear_gradients(self) -> None:
        """Remove all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None

    def result(self) -> list[torch.Tensor]:
        """Return the weights that training gives: the average, or the masters."""
        if self.average is not None:
            return self.average.shadow_params
        return [master.detach() for master in self.masters]

    @torch.no_grad()
    def set_weights(self, values: Sequence[torch.Tensor]) -> None:
        """Set masters and parameters."""
        for master, value in zip(self.masters, values, strict=True):
            master.copy_(shard_like(value, master))
        self._copy_masters()

    @contextmanager
    def using_result(self) -> Iterator[None]:
        """Put the average into the parameters inside, where there is one."""
        if self.average is None:
            yield
            return
        before = [parameter.detach().clone() for parameter in self.parameters]
        _copy(self.average.shadow_params, self.parameters)
        try:
            yield
        finally:
            _copy(before, self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the state with full tensors; where weights are sharded, all processes have to call it together."""
        state = {
            "masters": [master.detach() for master in self.masters],
            "average": [],
            "optimizer": self.optimizer.state_dict(),
        }
        if self.average is not None:
            state["average"] = self.average.shadow_params
        return {**gather_state(state), "scaler": self.scaler.state_dict(), "steps_done": self.steps_done}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.set_weights(state["masters"])
        if self.average is not None:
            for shadow, saved in zip(self.average.shadow_params, state["average"], strict=True):
                shadow.copy_(shard_like(saved, shadow))
            self.average.optimization_step = state["steps_done"]
        # The state counts parameters group by group.
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.optimizer.load_state_dict(shard_optimizer_state(state["optimizer"], ordered))
        self.scaler.load_state_dict(state["scaler"])
        self.steps_done = state["steps_done"]

    def _copies(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield the parameters whose masters are copies, with these."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                yield parameter, master

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for parameter, master in self._copies():
            parameter.copy_(master)


def _make_master(parameter: nn.Parameter) -> nn.Parameter:
    """Return a float32 copy of a parameter in bfloat16, and any other parameter itself."""
    if parameter.dtype != torch.bfloat16:
        return parameter
    return nn.Parameter(parameter.detach().float())


@torch.no_grad()
def _copy(values: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
