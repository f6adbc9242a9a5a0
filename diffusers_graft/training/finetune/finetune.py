"""Stage two: the grafted model is finetuned as a whole, against the accumulated error of its new parts.

Paper: arXiv 2506.05340, section 3.1 (end-to-end finetuning), Eq. 1.
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
from ..distill.student import mean_of_last_tenth
from ..fsdp import fsdp_plugin, recomputes_blocks, shard, shard_original
from ..identity import describe_run, read_held_out
from ..loop import train
from ..noised_batch import Noising
from ..previews import Preview
from ..session import Session
from .config import FinetuneConfig
from .lora import add_lora, refuse_foreign_lora, remove_lora
from .stage import FinetuneStage, scales_by_parameter
from .teacher import Teacher


@torch.inference_mode(False)
@torch.enable_grad()
def finetune(
    model: ModelMixin,
    batches: Iterable[Batch],
    config: FinetuneConfig | None = None,
    *,
    noise_scheduler: SchedulerMixin | None = None,
    held_out: Iterable[Batch] | None = None,
    null_prompt: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    resume: bool | str | Path = False,
    callbacks: Iterable[Any] = (),
    previews: Iterable[Preview] = (),
) -> list[float]:
    """Finetune a grafted model in place: to answer as the ungrafted one does, on the denoising objective, or both.

    Weights in bfloat16 are trained through copies in float32. Launched with `--use_fsdp --fsdp_version 2`, weights are
    sharded over processes (see `training.fsdp`): leave the model in the host's memory then.

    Args:
        model: with its graft installed. `unset_graft` afterwards still gives the original bit for bit: where shared
            weights are trained (`train="all"`), their untrained values stay beside the graft.
        batches: see `diffusers_graft.training.batches`: a clean `sample` and conditioning, or model arguments, with a
            `target` where `denoising` is above zero.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        held_out: batches that are never trained on; the weights with the smallest denoising loss on them are the
            result.
        null_prompt: conditioning of the empty prompt, one sample of each argument. If given, it takes the place of
            prompts at the rate `prompt_dropout`.
        output_dir: for `training.jsonl` and checkpoints; nothing is written without it. Checkpoints of an earlier run
            there are moved aside unless it is resumed.
        resume: continue exactly from the newest checkpoint in `output_dir`, or from the checkpoint at this path, on a
            model prepared as the first time; a run that has finished may be resumed with more steps. Starts anew where
            True finds no checkpoint.
        callbacks: see `diffusers_graft.training.callbacks.Callbacks`.
        previews: see `diffusers_graft.training.previews.Preview`; `dg.Samples` draws pictures.

    Returns:
        The loss of every step.

    Raises:
        StateError: no graft is installed and enabled, LoRA is there already, a callback takes the graft out, or the
            checkpoint is of another run.
        TrainingError: a loss that is not finite, batches that ran out, held-out batches that are training data, a
            teacher that is the model itself, blocks that cannot be recomputed, other settings, or a launch that is not
            supported.
        FileError: an `output_dir` that cannot be written to, or no checkpoint at the path to resume from.
    """
    config = config_or_default(config, FinetuneConfig)
    # Everything is checked before anything is changed.
    config = config.for_model(model, require_graft(model).sites)
    graft = _require_trainable(model, config)
    noising = Noising.from_config(config, noise_scheduler, null_prompt)
    stream = BatchStream(batches)
    evaluated = read_held_out(held_out, config.held_out_batches, stream)
    noising.require_usable(model, stream.peek(), *(evaluated or ()))
    session = Session(
        "two",
        config,
        describe_run("two", config, graft, model, noising, stream, evaluated),
        model.device,
        folder=output_dir,
        resume=resume,
        callbacks=callbacks,
        model=model,
        held_out=evaluated,
        previews=previews,
    )
    losses: list[float] = []
    with (
        prepared(model, graft, config, losses, bool(resume)),
        shard(model, graft.sites, trained=True, precision=config.precision) as student,
    ):
        teacher = Teacher(
            student,
            output_weight=config.distill_output,
            feature_weight=config.distill_features or 0.0,
            needs_prediction=bool(config.match_distribution),
            original=shard_original(model, graft.sites, config.precision) if config.uses_teacher else None,
        )
        stage = FinetuneStage(student, require_graft(student), teacher, config, noising, stream, evaluated, losses)
        costs = train(stage, session)
    row = {"stage": "two", **config.to_dict(), **costs}
    row["first_loss"] = losses[0]
    row["last_loss"] = mean_of_last_tenth(losses)
    if config.progressive is not None:
        row["order"] = [site.address for site in stage.order]
        row["turns"] = stage.turns
    if stage.best_evaluation is not None:
        row["best_step"], row["held_out_loss"] = stage.best_evaluation
    graft.history.append(row)
    return losses


def _require_trainable(model: ModelMixin, config: FinetuneConfig) -> Graft:
    """Return the enabled graft. Raises, before anything is touched, where the model cannot be trained so."""
    # Raises for a launch that is not supported.
    fsdp_plugin(config.optimizer)
    graft = require_graft(model)
    if not is_enabled(model):
        raise StateError("Stage two trains the grafted model: call model.enable_graft() first.")
    check_processors(graft)
    refuse_foreign_lora(model, graft)
    if config.progressive is not None and fsdp_plugin() is not None:
        raise TrainingError("Weights that are sharded cannot take turns with the original's: set progressive=None.")
    if graft.is_standalone and (config.uses_teacher or config.progressive is not None):
        raise StateError(
            "This model was loaded in full: the parts its graft replaced are not in the file, so there is no original "
            "to learn from or to take turns with. Load the base model and the graft, or train on the data alone: "
            "denoising=1, distill_output=0, progressive=None."
        )
    if not graft.plan.edits and not config.denoising:
        raise TrainingError(
            "This graft replaces nothing, so the ungrafted model that it would learn from is the model itself: set "
            "denoising=1, or make a plan with an edit."
        )
    # Raises for keys that name no site.
    scales_by_parameter(model, graft, config.lr_scale)
    if recomputes_blocks(config.gradient_checkpointing) and not model._supports_gradient_checkpointing:
        raise TrainingError(f"{type(model).__name__} cannot recompute its blocks: set gradient_checkpointing=False.")
    return graft


@contextmanager
def prepared(
    model: ModelMixin, graft: Graft, config: FinetuneConfig, losses: list[float], resume: bool
) -> Iterator[None]:
    """Give gradients to the parameters to train, and to no others, inside; flags and modes are put back afterwards.

    An error that comes before there are `losses` leaves no LoRA and no copies of weights behind, so one can try again.
    """
    # Training would change what seats share with the original.
    for path in graft.seats:
        graft.untie(path)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    recomputes = recomputes_blocks(config.gradient_checkpointing)
    was_checkpointing = model.is_gradient_checkpointing
    had_lora = graft.adapter_config is not None
    names_before = set(graft.body)
    try:
        # LoRA first, since peft freezes whatever it did not add.
        if config.lora is not None:
            add_lora(model, graft, config.lora, resume=resume, seed=config.seed)
        _set_trained_parameters(model, graft, config)
        _set_training_mode(model)
        if recomputes:
            model.enable_gradient_checkpointing()
        yield
    except BaseException:
        if not losses:
            graft.body = {name: tensor for name, tensor in graft.body.items() if name in names_before}
            if not had_lora:
                remove_lora(model, graft)
        raise
    finally:
        if recomputes and not was_checkpointing:
            model.disable_gradient_checkpointing()
        # LoRA brings parameters and modules that were not there before.
        for parameter in flags.keys() | set(model.parameters()):
            parameter.grad = None
            parameter.requires_grad_(flags.get(parameter, True))
        for module in modes.keys() | set(model.modules()):
            module.training = modes.get(module, modes[model])


def _set_training_mode(model: ModelMixin) -> None:
    model.train()
    # The root stays in evaluation mode: HiDream, for one, returns something else in training.
    model.training = False
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            # Labels are dropped for whole samples as a batch is noised.
            module.eval()


def _set_trained_parameters(model: ModelMixin, graft: Graft, config: FinetuneConfig) -> None:
    """Set `requires_grad`; shared weights that will change are copied, so that removing the graft brings them back."""
    operators = {id(tensor) for path in graft.seats for tensor in graft.tensors_of(path).values()}
    seats = tuple(f"{path}." for path in graft.seats)
    for name, parameter in model.named_parameters():
        is_lora = ".lora_" in name
        is_trained = is_lora or id(parameter) in operators
        if config.train == "all":
            is_trained = parameter.is_floating_point()
            if is_trained and not is_lora and not name.startswith(seats):
                graft.body.setdefault(name.replace(".base_layer.", "."), parameter.detach().clone())
        parameter.requires_grad_(is_trained)
