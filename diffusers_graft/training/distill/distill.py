"""Stage one: every new part is trained to do what the original part does, all of them in one forward of the model.

Hooks on the original model give each new part the inputs that the old part received and the output it gave. The part
runs its own forward and backward right there and drops everything before the next site is reached: no second model,
nothing on disk, and the peak is one site's activations. Paper: arXiv 2506.05340, Eq. 2, with noise redrawn each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin

from ...core.sites import Site, Sites
from ...errors import StateError, TrainingError
from ...injection.graft import Graft, is_enabled
from ...injection.install import require_built_beside
from ...inspection import evaluating
from ...planning.rules import select
from ..batches import Batch, BatchStream
from ..config import config_or_default
from ..distributed import process_state
from ..fsdp import seats_beside, shard
from ..identity import describe_run, read_held_out
from ..loop import train
from ..noised_batch import Noising
from ..previews import Preview
from ..session import Session
from .config import ClosedFormConfig, DistillConfig
from .ridge import closed_form, output_layer
from .split_stage import SplitStage
from .stage import DistillStage, make_students
from .student import SiteReport


@torch.inference_mode(False)
def distill(
    model: ModelMixin,
    graft: Graft,
    batches: Iterable[Batch],
    config: DistillConfig | None = None,
    *,
    noise_scheduler: SchedulerMixin | None = None,
    held_out: Iterable[Batch] | None = None,
    null_prompt: Mapping[str, Any] | None = None,
    output_dir: str | Path | None = None,
    resume: bool | str | Path = False,
    callbacks: Iterable[Any] = (),
    previews: Iterable[Preview] = (),
) -> dict[str, SiteReport]:
    """Train every part of a graft to do what the part it replaces does.

    Launched with `--use_fsdp --fsdp_version 2`, the weights of the model are sharded over processes (see
    `training.fsdp`), and every process holds the new parts in full.

    Args:
        model: the model the graft was built beside; intact, not grafted. It is not changed.
        graft: from `build_graft`; trained in place.
        batches: see `diffusers_graft.training.batches`: dicts with a clean `sample` and conditioning, or complete
            model arguments.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        held_out: batches that are never trained on; by their error the best weights are chosen.
        null_prompt: conditioning of the empty prompt, one sample of each argument. If given, it takes the place of
            prompts at the rate `prompt_dropout`.
        output_dir: for `training.jsonl` and checkpoints; nothing is written without it. Checkpoints of an earlier run
            there are moved aside unless it is resumed.
        resume: continue exactly from the newest checkpoint in `output_dir`, or from the checkpoint at this path; a run
            that has finished may be resumed with more steps. Starts anew where True finds no checkpoint.
        callbacks: see `diffusers_graft.training.callbacks.Callbacks`.
        previews: see `diffusers_graft.training.previews.Preview`; `dg.Samples` draws pictures.

    Returns:
        A report for every site that was trained, by address.

    Raises:
        StateError: the graft is enabled, or a callback enables it (its parts would be compared with themselves); it
            belongs to another model; or the checkpoint is of another run.
        TrainingError: a loss that is not finite, batches that ran out, held-out batches that are training data, other
            settings, or a launch that is not supported.
        FileError: an `output_dir` that cannot be written to, or no checkpoint at the path to resume from.
    """
    config = config_or_default(config, DistillConfig)
    # Everything is checked before anything is changed.
    _require_original_model(model, graft)
    config = config.for_model(model, graft.sites)
    noising = Noising.from_config(config, noise_scheduler, null_prompt)
    stream = BatchStream(batches)
    sites = _choose_sites(graft, config)
    losses = by_site(graft, config.loss, "auto")
    lr_scales = by_site(graft, config.lr_scale, 1.0)
    evaluated = read_held_out(held_out, config.held_out_batches, stream)
    noising.require_usable(model, stream.peek(), *(evaluated or ()))
    session = Session(
        "one",
        config,
        describe_run("one", config, graft, model, noising, stream, evaluated),
        model.device,
        folder=output_dir,
        resume=resume,
        callbacks=callbacks,
        model=model,
        held_out=evaluated,
        previews=previews,
    )
    # Dropout of the teacher would be noise in what the students imitate.
    with (
        evaluating(model),
        shard(model, graft.sites, precision=config.precision) as teacher,
        seats_beside(graft, model, teacher),
    ):
        # A checkpoint holds what the closed form gave, and its batches count as read.
        if config.closed_form is not None and session.checkpoint is None:
            _solve_output_layers(teacher, graft, stream, sites, config.closed_form, noise_scheduler)
        stage = _make_stage(teacher, graft, sites, config, losses, lr_scales, noising, stream, evaluated)
        with stage.prepared():
            costs = train(stage, session)
        stage.exchange_weights()
        reports = stage.gather_reports()
    graft.history.append(
        {
            "stage": "one",
            **config.to_dict(),
            **costs,
            # Groups of sites train one after the other, each for so many steps.
            "steps": max(student.optimizer.steps_done for student in stage.students.values()),
            "sites": [report.to_dict() for report in reports.values()],
        }
    )
    return reports


def _make_stage(
    teacher: ModelMixin,
    graft: Graft,
    sites: list[Site],
    config: DistillConfig,
    losses: Mapping[str, str],
    lr_scales: Mapping[str, float],
    noising: Noising,
    stream: BatchStream,
    held_out: list[Batch] | None,
) -> DistillStage:
    """Create the stage: of all sites in this process, or of its own where processes divide them."""
    if config.split_sites and process_state().num_processes > 1:
        return SplitStage(teacher, graft, sites, config, losses, lr_scales, noising, stream, held_out)
    students = make_students(graft, sites, config, losses, lr_scales)
    return DistillStage(teacher, graft, students, config, noising, stream, held_out)


def _require_original_model(model: ModelMixin, graft: Graft) -> None:
    if is_enabled(model):
        raise StateError(
            "Stage one watches the original parts: call model.unset_graft() or model.disable_graft() first."
        )
    require_built_beside(model, graft)


def _solve_output_layers(
    teacher: ModelMixin,
    graft: Graft,
    stream: BatchStream,
    sites: list[Site],
    config: ClosedFormConfig,
    noise_scheduler: SchedulerMixin | None,
) -> None:
    """Solve the closed form of the parts that have an output layer."""
    paths = {site.path for site in sites if output_layer(graft.seats[site.path]) is not None}
    if paths:
        closed_form(teacher, graft, stream, config, noise_scheduler=noise_scheduler, paths=paths)


def _choose_sites(graft: Graft, config: DistillConfig) -> list[Site]:
    """Return the sites to train, in forward order. Raises `TrainingError` for keys that name none of the graft's."""
    edited = Sites(edit.site for edit in graft.plan.edits)
    if not edited:
        raise TrainingError("This graft replaces nothing, so there is nothing to train: make a plan with an edit.")
    if config.sites is None:
        return list(edited)
    keys = [config.sites] if isinstance(config.sites, str) else config.sites
    named = {site for key in keys for site in select(graft.sites, key)}
    chosen = [site for site in edited if site in named]
    if not chosen:
        there = ", ".join(site.address for site in edited)
        raise TrainingError(f"None of the graft's sites is among {', '.join(keys)}: it has {there}.")
    return chosen


def by_site(graft: Graft, setting: Any, default: Any) -> dict[str, Any]:
    """Return a setting for every path: the same for all, or by rule key, where later keys win."""
    paths = [edit.site.path for edit in graft.plan.edits]
    if not isinstance(setting, Mapping):
        return dict.fromkeys(paths, setting)
    values = dict.fromkeys(paths, default)
    for key, value in setting.items():
        named = [site.path for site in select(graft.sites, key) if site.path in values]
        if not named:
            there = ", ".join(edit.site.address for edit in graft.plan.edits)
            raise TrainingError(f"{key!r} names none of the graft's sites: it has {there}.")
        values |= dict.fromkeys(named, value)
    return values
