"""Stage two: the grafted model settles, on the model's own objective.

Paper: arXiv 2506.05340, section 3.1 (end-to-end finetuning against accumulated error), Eq. 1.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding
from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm

from ..anatomy import predict
from ..errors import StateError, TrainingError, UnknownNameError
from ..graft import Graft, is_enabled
from ..surgery import check_seats, require_graft
from .data import Batch, Noising, denoising_loss, repeated
from .lora import add_lora

TRAINABLE = ("operators", "all")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of stage two.

    Attributes:
        steps, lr, warmup: AdamW at a constant learning rate after a linear warm-up (the paper: 1e-4 after 1,000 steps).
        train: `"operators"` (the new parts) or `"all"` weights of the model, as in the paper's class-conditional runs.
        lora: LoRA on the rest of the model, beside the operators (the paper's text-to-image run: rank 64).
        ema_decay: exponential moving average whose weights are kept at the end; 0 keeps the last ones.
        max_grad_norm: clipping, over all parameters.
        timesteps, seed: of the noise, see `Noising`.
        progress: show a bar.
    """

    steps: int = 500
    lr: float = 1e-4
    warmup: int = 20
    train: str = "all"
    lora: LoraConfig | None = None
    ema_decay: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    timesteps: str = "auto"
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        if self.train not in TRAINABLE:
            raise UnknownNameError("set of weights to train", self.train, TRAINABLE)
        if self.steps < 1 or self.lr <= 0:
            raise TrainingError(f"Stage two needs at least one step and a positive learning rate; got {self}.")

    def to_dict(self) -> dict[str, Any]:
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lora"}
        return {**settings, "lora": None if self.lora is None else {"r": self.lora.r, "alpha": self.lora.lora_alpha}}


def finetune(
    model: ModelMixin, batches: Iterable[Batch], config: FinetuneConfig | None = None, *,
    noise_scheduler: SchedulerMixin | None = None,
) -> list[float]:  # fmt: skip
    """Finetune a grafted model in place, on its own denoising objective.

    Args:
        model: with its graft installed. `unset_graft` afterwards still gives the original bit for bit: where shared weights
            are trained (`train="all"`), their untrained values are kept beside the graft.
        batches: see `training.data`: dicts with a clean `sample` and conditioning, or model arguments with a `target`.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.

    Returns:
        The loss of every step.

    Raises:
        StateError: no graft is installed and running, or LoRA is there already.
        TrainingError: a loss that is not finite, or batches that ran out.
    """
    config = config or FinetuneConfig()
    graft = require_graft(model)
    if not is_enabled(model):
        raise StateError("Stage two trains the grafted model: call model.enable_graft() first.")
    check_seats(graft)
    noising = Noising(scheduler=noise_scheduler, timesteps=config.timesteps)
    with _trainable(model, graft, config) as parameters, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        losses = _run(model, parameters, batches, config, noising)
    graft.history.append({"stage": "two", **config.to_dict(), "first_loss": losses[0], "last_loss": losses[-1]})
    return losses


def _run(model: ModelMixin, parameters: list[nn.Parameter], batches: Iterable[Batch], config: FinetuneConfig,
         noising: Noising) -> list[float]:  # fmt: skip
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    average = [parameter.detach().clone() for parameter in parameters] if config.ema_decay else []
    generator = torch.Generator().manual_seed(config.seed)
    losses: list[float] = []
    with tqdm(total=config.steps, desc="stage two", unit="step", disable=not config.progress) as bar:
        for step, batch in zip(range(config.steps), repeated(batches), strict=False):
            losses.append(_backward(model, noising(model, batch, generator), step))
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average:
                decay = min(config.ema_decay, (step + 1) / (step + 10))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=False):
            parameter.copy_(value)
    return losses


def _backward(model: ModelMixin, noised, step: int) -> float:
    if noised.target is None:
        raise TrainingError('Stage two needs to know what to predict: batches need a "sample" to noise, or a "target".')
    loss = denoising_loss(predict(model, noised.inputs), noised.target)
    if not torch.isfinite(loss):
        raise TrainingError(
            f"Stage two: the loss is {loss.item()} at step {step}; the weights are those of the step before. "
            "Look at the batch for values that are not finite, or lower FinetuneConfig.lr."
        )
    loss.backward()
    return loss.item()


@contextmanager
def _trainable(model: ModelMixin, graft: Graft, config: FinetuneConfig) -> Iterator[list[nn.Parameter]]:
    """The parameters to train; flags and modes are put back afterwards.

    LoRA comes first, since peft freezes whatever it did not add.
    """
    for path in graft.seats:
        graft.unshare(path)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if config.lora is not None:
        add_lora(model, graft, config.lora)
    modes = {module: module.training for module in model.modules()}
    chosen = _chosen(model, graft, config)
    if config.train == "all":
        _keep_untrained(model, graft, chosen)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    model.train()
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()  # labels are dropped for whole samples, in `data`
    try:
        yield [parameter for parameter in model.parameters() if id(parameter) in chosen]
    finally:
        for parameter in model.parameters():
            parameter.grad = None
            parameter.requires_grad_(flags.get(parameter, True))
        for module, mode in modes.items():
            module.training = mode


def _chosen(model: ModelMixin, graft: Graft, config: FinetuneConfig) -> set[int]:
    """Identities of the parameters that stage two trains."""
    lora = {id(p) for name, p in model.named_parameters() if ".lora_" in name}
    if config.train == "all":
        return {id(parameter) for parameter in model.parameters() if parameter.is_floating_point()}
    return lora | {id(tensor) for path in graft.seats for tensor in graft.own_tensors_of(path).values()}


def _keep_untrained(model: ModelMixin, graft: Graft, chosen: set[int]) -> None:
    """Remember the values of shared weights that are about to change, so that removing the graft brings them back."""
    seats = tuple(f"{path}." for path in graft.seats)
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen and not name.startswith(seats) and ".lora_" not in name:
            graft.body.setdefault(name, parameter.detach().clone())
