"""Measure choices one by one, each the only new part of the model, for a plan under a budget (planner.py)."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from tqdm.auto import tqdm

from ..core.progress import hide_bar
from ..errors import GraftError, OperatorError, RuleError, StateError, TrainingError
from ..evaluation.benchmark import compare, require_rounds, with_graft
from ..evaluation.cost import count_flops, count_parameters
from ..injection.graft import Graft, build_graft, get_graft
from ..inspection import evaluating, predict
from ..planning.plan import Edit, GraftPlan, plan_graft
from ..reporting.report import try_report
from ..reporting.run_folder import SURVEY
from ..training.batches import Batch
from ..training.distill.config import DistillConfig
from ..training.distill.distill import distill
from ..training.distributed import is_main_process
from .judge import HarmJudge, cosines_of
from .planner import Choice, Survey, check_budget

logger = logging.getLogger(__name__)


def survey(
    model: ModelMixin,
    candidates: Mapping[str, Any],
    held_out: Iterable[Batch],
    *,
    batches: Iterable[Batch] | None = None,
    config: DistillConfig | None = None,
    noise_scheduler: SchedulerMixin | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    rounds: int = 7,
    seed: int = 0,
    progress: bool = True,
    budget: Mapping[str, float] | None = None,
) -> Survey:
    """Measure the harm and the savings of every candidate at every site, each replaced alone.

    `Survey.plan(latency=0.8)` then chooses among them.

    Args:
        model: without a graft; it is as it was afterwards.
        candidates: a list of operators by rule key, as in `{"self_attention[:]": ["hyena_x", "neighborhood"]}`. Blocks
            have candidates, too (`"block[:]": ["remove"]`): a plan replaces a block, or some of its parts.
        held_out: batches to judge on, a finite number; time and FLOPs are those of the first.
        batches, config: of stage one, which trains the first candidates of all sites, then the second ones, and so
            on. Without them parts are judged untrained, which favours those that start close to the original.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        output_dir, resume: as in `dg.distill`; stage one has a folder in it for the first candidates, one for the
            second ones, and so on. `survey.json` and `report.html` are written there, too.
        rounds: timed runs of each operator, two or more; sites that are alike are timed together.
        seed: of random starts and of the noise that parts are judged under.
        progress: show bars, on a terminal.
        budget: of the plan that is wanted, such as `{"flops": 0.8}`; an error before stage one if no plan meets it.

    Raises:
        StateError: a model that is grafted.
        GraftError: a budget that is no share between 0 and 1, or that no plan meets.
        RuleError: no candidates, one that is named twice, or one that replaces several blocks.
        OperatorError: a candidate that cannot run at a site; and what `plan_graft`, `build_graft` and `dg.distill`
            raise.
        TrainingError: `batches` without `config`, or the reverse; held-out batches that do not fit, or for which the
            model gives zeros or NaN.
    """
    _require_ready(model, batches, config, rounds)
    if budget is not None:
        check_budget(budget)
    grafts = [build_graft(model, plan, seed=seed) for plan in plan_candidates(model, candidates)]
    judge = HarmJudge(model, held_out, noise_scheduler, seed)
    with evaluating(model), torch.no_grad():
        # before hours of training: a part that cannot run is found here
        saved = _savings(model, grafts, judge.inputs[0], rounds)
    if budget is not None:
        unjudged = tuple(Choice(edit, 0.0, shares) for edit, shares in saved.items())
        Survey(type(model).__name__, unjudged).require_reachable(budget)
    if config is not None:
        assert batches is not None
        trainable = [graft for graft in grafts if graft.is_trainable]
        for turn, graft in enumerate(trainable):
            folder = None if output_dir is None else Path(output_dir) / f"candidates-{turn}"
            distill(model, graft, batches, config, noise_scheduler=noise_scheduler, output_dir=folder, resume=resume)
    # one part at a time, so that harms are those of single choices
    singles = [(edit, _select_edits(graft, [edit])) for graft in grafts for edit in graft.plan.edits]
    bar = tqdm(singles, desc="survey", unit="choice", disable=hide_bar(progress))
    choices = []
    sketches = {}
    for edit, part in bar:
        harm, sketches[edit] = judge.judge(model, part)
        choices.append(Choice(edit, harm, saved[edit]))
    protocol = {
        "samples": judge.samples,
        "seed": seed,
        "rounds": rounds,
        "device": str(model.device),
        "torch": torch.__version__,
        "stage one": config and config.to_dict(),
    }
    usable = _usable(choices)
    cosines = cosines_of([sketches[choice.edit] for choice in usable])
    result = Survey(type(model).__name__, usable, protocol, cosines, tuple(grafts), judge)
    if output_dir is not None and is_main_process():
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        result.save(Path(output_dir) / SURVEY)
        try_report(output_dir)
    return result


def _require_ready(
    model: ModelMixin, batches: Iterable[Batch] | None, config: DistillConfig | None, rounds: int
) -> None:
    """Raise an error for arguments that a survey cannot start from."""
    if get_graft(model) is not None:
        raise StateError("A survey starts from the original: call model.unset_graft() first.")
    if (batches is None) != (config is None):
        raise TrainingError("Stage one needs both batches= and config=, such as dg.DistillConfig(steps=100).")
    require_rounds(rounds)


def plan_candidates(model: ModelMixin, candidates: Mapping[str, Any]) -> list[GraftPlan]:
    """Return a plan of the first candidates of all sites, one of the second, and so on; then the same for blocks.

    Raises `RuleError` for candidates that cannot be surveyed.
    """
    lists = list(candidates.values()) if isinstance(candidates, Mapping) else []
    if not lists or not all(isinstance(operators, list | tuple) and operators for operators in lists):
        example = {"self_attention[:]": ["hyena_x", "identity"]}
        raise RuleError(f"Candidates are a list of operators by rule key, such as {example}; got {candidates!r}.")
    # in separate plans, since the parts of a block that is removed have no place in one plan with it
    of_blocks = {key: operators for key, operators in candidates.items() if str(key).strip().startswith("block")}
    of_parts = {key: operators for key, operators in candidates.items() if key not in of_blocks}
    plans = []
    for group in (of_parts, of_blocks):
        for turn in range(max(map(len, group.values()), default=0)):
            rules = {key: operators[turn] for key, operators in group.items() if turn < len(operators)}
            plans.append(plan_graft(model, rules))
    counts = Counter(edit for plan in plans for edit in plan.edits)
    for edit, count in counts.items():
        if edit.site.kind in ("block_pair", "block_run"):
            raise RuleError(f"A survey tries single blocks, and {edit} takes several. Plan those by hand.")
        if count > 1:
            raise RuleError(f"{edit} is named {count} times among the candidates of one site. Name it once.")
    return plans


def _select_edits(graft: Graft, edits: list[Edit]) -> Graft:
    """Return a graft of some of another's parts, which both share."""
    plan = GraftPlan(graft.plan.model_class, tuple(edits))
    paths = [edit.site.path for edit in edits]
    seats = {path: graft.seats[path] for path in paths}
    originals = {path: graft.originals[path] for path in paths}
    return replace(graft, plan=plan, seats=seats, originals=originals)


def _savings(
    model: ModelMixin, grafts: list[Graft], inputs: dict[str, Any], rounds: int
) -> dict[Edit, dict[str, float]]:
    """Measure the shares of time, FLOPs and parameters that every edit saves.

    Time is that of an operator at all sites alike together: a single part is too small a share of a model to be timed
    by itself. Sites are alike in shape and in what their parts cost, since parts of one shape may run on the image,
    on its prompt, or on a level of a pyramid.

    Raises `OperatorError` for an edit that cannot run.
    """
    all_flops, all_parameters = _counts(model, None, inputs)
    saved: dict[Edit, dict[str, float]] = {}
    alike: dict[Any, list[Edit]] = {}
    for graft in grafts:
        for edit in graft.plan.edits:
            try:
                counts = _counts(model, _select_edits(graft, [edit]), inputs)
            except GraftError as error:
                raise OperatorError(f"{edit} cannot run: {error} Leave that site out of the candidates.") from error
            flops, parameters = counts
            saved[edit] = {"flops": 1 - flops / all_flops, "parameters": 1 - parameters / all_parameters}
            shape = replace(edit.site, index=0, path="")
            alike.setdefault((graft, edit.config, shape, counts), []).append(edit)
    parts: dict[str, Graft | None] = {"original": None}
    for number, ((graft, *_), edits) in enumerate(alike.items()):
        parts[str(number)] = _select_edits(graft, edits)
    # the call is one and the same; the installed graft makes the difference
    runs = dict.fromkeys(parts, partial(predict, model, inputs))
    _, *timings = compare(runs, rounds=rounds, around=lambda name: with_graft(model, parts[name]))
    for timing, edits in zip(timings, alike.values(), strict=True):
        for edit in edits:
            saved[edit]["latency"] = (1 - timing.ratio) / len(edits)
    return saved


def _counts(model: ModelMixin, graft: Graft | None, inputs: dict[str, Any]) -> tuple[int, int]:
    """Return the FLOPs and the parameters of a model with a graft."""
    with with_graft(model, graft):
        return count_flops(model, inputs), count_parameters(model)


def _usable(choices: list[Choice]) -> tuple[Choice, ...]:
    """Return the choices whose answers are finite, site by site in forward order, blocks behind their parts."""
    order: dict[Any, int] = {}
    finite = []
    for choice in choices:
        # the first candidates name all sites, in forward order
        order.setdefault(choice.edit.site, len(order))
        if math.isfinite(choice.harm):
            finite.append(choice)
        else:
            logger.warning("%s gives answers that are not finite: it is left out of the survey.", choice.edit)
    return tuple(sorted(finite, key=lambda choice: order[choice.edit.site]))
