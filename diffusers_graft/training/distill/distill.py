"""Stage one: every new part learns what the old part does, all of them in one pass of the intact model.

Hooks on the untouched model hand each new part the arguments the old one received and the output it gave. The part
takes
its own forward and backward right there and drops everything before the next site is reached: no second model, nothing
on disk, and the peak is one site's activations. Paper: arXiv 2506.05340, Eq. 2, with noise redrawn each step.
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
from ..batches import Batch, BatchStream, read_first
from ..config import config_or_default
from ..fsdp import seats_beside, shard
from ..noised_batch import Noising
from ..session import has_checkpoint
from .config import ClosedFormConfig, DistillConfig
from .loop import Classroom, enroll
from .ridge import closed_form, output_layer
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
    resume: bool = False,
    callbacks: Iterable[Any] = (),
) -> dict[str, SiteReport]:
    """Teach every part of a graft to do what the part it replaces does.

    Args:
        model: the model the graft was built beside; intact, not grafted. It is not changed.
        graft: from `build_graft`; trained in place.
        batches: see `diffusers_graft.training.batches`: dicts with a clean `sample` and conditioning, or complete
            model arguments.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        held_out: batches that are never trained on; by their error the best weights are chosen.
        null_prompt: conditioning of no prompt, one sample of each; prompts are dropped where it is given.
        output_dir: for `training.jsonl` and checkpoints; nothing is written without it.
        resume: continue from the last checkpoint there, exactly; start where there is none.
        callbacks: see `diffusers_graft.training.session.Session`.

    Returns a report for every site that was trained, by address. Launched with `--use_fsdp --fsdp_version 2`, the
    weights of the model are spread over processes (see `training.sharding`), and every process holds the new parts
    whole.

    Raises:
        StateError: the graft runs, or a callback makes it run: its parts would teach themselves; or it is none of this
            model.
        TrainingError: a loss that is not finite, batches that ran out, other settings, or a launch that cannot be
            followed.
    """
    config = config_or_default(config, DistillConfig)
    _require_originals(model, graft)
    noising, stream, chosen = (
        Noising.from_config(config, noise_scheduler, null_prompt),
        BatchStream(batches),
        _chosen(graft, config),
    )
    held_out = None if held_out is None else read_first(held_out, config.held_out_batches)
    noising.require_usable(model, stream.peek(), *(held_out or ()))
    with evaluating(model), shard(model, graft.sites) as teacher, seats_beside(graft, model, teacher):
        if config.closed_form is not None and not (resume and has_checkpoint(output_dir, "one")):
            _solve(teacher, graft, stream, chosen, config.closed_form, noise_scheduler)
        pupils = enroll(
            graft, chosen, config, _by_site(graft, config.loss, "auto"), _by_site(graft, config.lr_scale, 1.0)
        )
        classroom = Classroom(teacher, graft, pupils, config, noising, held_out)
        facts = classroom.teach(stream, output_dir=output_dir, resume=resume, callbacks=callbacks)
    reports = {pupil.site.address: pupil.report for pupil in pupils.values()}
    graft.history.append(
        {"stage": "one", **config.to_dict(), **facts, "sites": [one.to_dict() for one in reports.values()]}
    )
    return reports


def _require_originals(model: ModelMixin, graft: Graft) -> None:
    if is_enabled(model):
        raise StateError(
            "Stage one watches the original parts: call model.unset_graft() or model.disable_graft() first."
        )
    require_built_beside(model, graft)


def _solve(
    teacher: ModelMixin,
    graft: Graft,
    stream: BatchStream,
    chosen: list[Site],
    config: ClosedFormConfig,
    noise_scheduler: SchedulerMixin | None,
) -> None:
    """The closed form, of the parts that have an output layer."""
    if paths := {site.path for site in chosen if output_layer(graft.seats[site.path]) is not None}:
        closed_form(teacher, graft, stream, config, noise_scheduler=noise_scheduler, paths=paths)


def _chosen(graft: Graft, config: DistillConfig) -> list[Site]:
    """The sites to train, in forward order. Raises `TrainingError` for keys that name none of the graft's."""
    if not (edited := Sites(edit.site for edit in graft.plan.edits)):
        raise TrainingError("This graft replaces nothing, so there is nothing to teach: make a plan with an edit.")
    if config.sites is None:
        return list(edited)
    keys = [config.sites] if isinstance(config.sites, str) else config.sites
    named = {site for key in keys for site in select(graft.sites, key)}
    if not (chosen := [site for site in edited if site in named]):
        there = ", ".join(site.address for site in edited)
        raise TrainingError(f"None of the graft's sites is among {', '.join(keys)}: it has {there}.")
    return chosen


def _by_site(graft: Graft, setting: Any, usual: Any) -> dict[str, Any]:
    """A setting for every path: the same for all, or by rule key, where later keys win."""
    if not isinstance(setting, Mapping):
        return {edit.site.path: setting for edit in graft.plan.edits}
    values = {edit.site.path: usual for edit in graft.plan.edits}
    for key, value in setting.items():
        if not (named := {site.path: value for site in select(graft.sites, key) if site.path in values}):
            there = ", ".join(edit.site.address for edit in graft.plan.edits)
            raise TrainingError(f"{key!r} names none of the graft's sites: it has {there}.")
        values |= named
    return values
