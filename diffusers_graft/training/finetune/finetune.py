"""Stage two: the grafted model settles, on the model's own objective.

Paper: arXiv 2506.05340, section 3.1 (end-to-end finetuning against accumulated error), Eq. 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding

from ...errors import StateError, TrainingError
from ...injection.graft import Graft, is_enabled
from ...injection.install import check_processors, require_graft
from ..batches import Batch, BatchStream
from ..config import config_or_default
from ..distill.student import tail
from ..fsdp import fsdp_plugin, shard, shard_original
from ..noised_batch import Noising
from .config import FinetuneConfig
from .loop import Settling
from .lora import add_lora, refuse_foreign_lora, remove_lora
from .teacher import Teacher


@torch.inference_mode(False)
@torch.enable_grad()
def finetune(
    model: ModelMixin,
    batches: Iterable[Batch],
    config: FinetuneConfig | None = None,
    *,
    noise_scheduler: SchedulerMixin | None = None,
    null_prompt: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Any] = (),
) -> list[float]:
    """Finetune a grafted model in place, on its own denoising objective.

    Args:
        model: with its graft installed. `unset_graft` afterwards still gives the original bit for bit: where shared
            weights are trained (`train="all"`), their untrained values are kept beside the graft.
        batches: see `diffusers_graft.training.batches`: a clean `sample` and conditioning, or model arguments with a
            `target`.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        null_prompt: conditioning of no prompt, one sample of each; prompts are dropped where it is given.
        output_dir: for `training.jsonl` and checkpoints; nothing is written without it.
        resume: continue from the last checkpoint there, exactly, on a model prepared as the first time; start where
            there is none.
        callbacks: see `diffusers_graft.training.session.Session`.

    Launched with `--use_fsdp --fsdp_version 2`, weights are spread over processes (see `training.sharding`): leave the
    model in the host's memory then, where it stays whole. Returns the loss of every step.

    Raises:
        StateError: no graft is installed and running, LoRA is there already, or a callback takes the graft out.
        TrainingError: a loss that is not finite, batches that ran out, blocks that cannot be recomputed, other
            settings, or a launch that cannot be followed.
    """
    config = config_or_default(config, FinetuneConfig)
    graft = _checked(model, config)
    noising, stream, losses = Noising.from_config(config, noise_scheduler, null_prompt), BatchStream(batches), []
    noising.require_usable(model, stream.peek())
    with _trainable(model, graft, config, losses, resume), shard(model, graft.sites, trained=True) as trained:
        weights = {"output": config.distill_output, "features": config.distill_features}
        teacher = Teacher(
            trained, **weights, apart=shard_original(model, graft.sites) if any(weights.values()) else None
        )
        settling = Settling(trained, teacher, config, noising, losses)
        facts = settling.run(stream, output_dir=output_dir, resume=resume, callbacks=callbacks)
    graft.history.append(
        {"stage": "two", **config.to_dict(), **facts, "first_loss": losses[0], "last_loss": tail(losses)}
    )
    return losses


def _checked(model: ModelMixin, config: FinetuneConfig) -> Graft:
    """The running graft; what cannot be done is refused before anything is touched."""
    fsdp_plugin(config.optimizer)
    graft = require_graft(model)
    if not is_enabled(model):
        raise StateError("Stage two trains the grafted model: call model.enable_graft() first.")
    check_processors(graft)
    refuse_foreign_lora(model, graft)
    if config.gradient_checkpointing and not model._supports_gradient_checkpointing:
        raise TrainingError(f"{type(model).__name__} cannot recompute its blocks: set gradient_checkpointing=False.")
    return graft


@contextmanager
def _trainable(
    model: ModelMixin, graft: Graft, config: FinetuneConfig, losses: list[float], resume: bool
) -> Iterator[None]:
    """Gradients for the parameters to train, and for no others; flags and modes are put back afterwards.

    An error that comes before there are `losses` leaves no LoRA and no copies of weights behind, so one can try again.
    """
    for path in graft.seats:
        graft.untie(path)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    checkpointed, adapted, kept = model.is_gradient_checkpointing, graft.adapter_config is not None, set(graft.body)
    try:
        _prepare(model, graft, config, resume)
        yield
    except BaseException:
        if not losses:
            graft.body = {name: tensor for name, tensor in graft.body.items() if name in kept}
        if not losses and not adapted:
            remove_lora(model, graft)
        raise
    finally:
        if config.gradient_checkpointing and not checkpointed:
            model.disable_gradient_checkpointing()
        for parameter in flags.keys() | set(model.parameters()):
            parameter.grad = None
            parameter.requires_grad_(flags.get(parameter, True))
        for module in modes.keys() | set(model.modules()):
            module.training = modes.get(module, modes[model])


def _prepare(model: ModelMixin, graft: Graft, config: FinetuneConfig, resume: bool) -> None:
    """LoRA first, since peft freezes whatever it did not add; then what is trained, and how."""
    if config.lora is not None:
        add_lora(model, graft, config.lora, resume=resume, seed=config.seed)
    chosen = _chosen(model, graft, config)
    if config.train == "all":
        _keep_untrained(model, graft, chosen)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    model.train()
    model.training = False  # its modules train; the model itself answers as in its pipeline, where HiDream would not
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.eval()  # labels are dropped for whole samples, in `data`
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()


def _chosen(model: ModelMixin, graft: Graft, config: FinetuneConfig) -> set[int]:
    """Identities of the parameters that stage two trains."""
    lora = {id(p) for name, p in model.named_parameters() if ".lora_" in name}
    if config.train == "all":
        return {id(parameter) for parameter in model.parameters() if parameter.is_floating_point()}
    return lora | {id(tensor) for path in graft.seats for tensor in graft.tensors_of(path).values()}


def _keep_untrained(model: ModelMixin, graft: Graft, chosen: set[int]) -> None:
    """Remember the values of shared weights that are about to change, so that removing the graft brings them back."""
    seats = tuple(f"{path}." for path in graft.seats)
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen and not name.startswith(seats) and ".lora_" not in name:
            graft.body.setdefault(name.replace(".base_layer.", "."), parameter.detach().clone())
