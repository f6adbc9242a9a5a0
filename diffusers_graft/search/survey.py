"""Measuring choices one by one, for a plan under a budget (`analysis/planner.py`)."""

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

from ..errors import GraftError, OperatorError, RuleError, StateError, TrainingError
from ..evaluation.benchmark import compare, require_rounds, with_graft
from ..evaluation.cost import count_flops, count_parameters
from ..injection.graft import Graft, build_graft, get_graft
from ..inspection import evaluating, predict
from ..planning.plan import Edit, GraftPlan, plan_graft
from ..training.batches import Batch
from ..training.distill.config import DistillConfig
from ..training.distill.distill import distill
from ..training.finetune.objective import mean_of
from ..training.noised_batch import Noising
from .planner import Choice, Survey

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
) -> Survey:
    """What every candidate does and saves at every site, each replaced alone; `Survey.plan(latency=0.8)` chooses among
    them.

    Args:
        model: without a graft; it is as it was afterwards.
        candidates: a list of operators by rule key, as in `{"self_attention[:]": ["hyena_x", "neighborhood"]}`; of
            blocks, too (`"block[:]": ["remove"]`), which a plan takes as a whole or leaves to their parts' candidates.
        held_out: batches to judge on, a finite number; time and FLOPs are those of the first.
        batches, config: of stage one, which the first candidates of all sites go through, then the second, and so on.
            Without them parts are judged as they start, which favours those that start from most.
        noise_scheduler: of the model's pipeline, where batches hold clean samples.
        output_dir, resume: of stage one, as in `dg.distill`, a folder in it for each turn of candidates.
        rounds: timed runs of each operator, at all sites that are alike together; two or more.
        seed: of random starts and of the noise that parts are judged under.
        progress: show bars, on a terminal.

    Raises:
        StateError: a model that wears a graft.
        RuleError: no candidates, one that stands twice, or one that takes the place of several blocks.
        OperatorError: a candidate that cannot run at a site; and what `plan_graft`, `build_graft` and `dg.distill`
            raise.
        TrainingError: batches or settings without the other; held-out batches that do not fit, or are answered by
            zeros or NaN.
    """
    _require_ready(model, batches, config, rounds)
    grafts = [build_graft(model, plan, seed=seed) for plan in _plans(model, candidates)]
    exam = Exam(model, held_out, noise_scheduler, seed)
    with evaluating(model), torch.no_grad():
        saved = _savings(
            model, grafts, exam.inputs[0], rounds
        )  # before anything is taught: a part that cannot run is found
    for turn, graft in enumerate(graft for graft in grafts if config and graft.is_trainable):
        folder = None if output_dir is None else Path(output_dir) / f"candidates-{turn}"
        distill(model, graft, batches, config, noise_scheduler=noise_scheduler, output_dir=folder, resume=resume)
    singles = [(edit, _part(graft, [edit])) for graft in grafts for edit in graft.plan.edits]
    bar = tqdm(singles, desc="survey", unit="choice", disable=None if progress else True)
    choices = [Choice(edit, exam.harm(model, part), saved[edit]) for edit, part in bar]
    protocol = {"samples": exam.samples, "seed": seed, "rounds": rounds, "device": str(model.device)}
    protocol |= {"torch": torch.__version__, "stage one": config and config.to_dict()}
    return Survey(type(model).__name__, _usable(choices), protocol, tuple(grafts))


def _require_ready(
    model: ModelMixin, batches: Iterable[Batch] | None, config: DistillConfig | None, rounds: int
) -> None:
    if get_graft(model) is not None:
        raise StateError("A survey starts from the original: call model.unset_graft() first.")
    if (batches is None) != (config is None):
        raise TrainingError("Stage one needs both batches= and config=, such as dg.DistillConfig(steps=100).")
    require_rounds(rounds)


def _plans(model: ModelMixin, candidates: Mapping[str, Any]) -> list[GraftPlan]:
    """One of the first candidates of all sites, one of the second, and so on; then the same of blocks."""
    lists = list(candidates.values()) if isinstance(candidates, Mapping) else []
    if not lists or not all(isinstance(some, list | tuple) and some for some in lists):
        example = {"self_attention[:]": ["hyena_x", "identity"]}
        raise RuleError(f"Candidates are a list of operators by rule key, such as {example}; got {candidates!r}.")
    plans = []
    for blocks in (False, True):  # apart, since parts of a block that is taken away have no place in one plan with it
        some = {key: each for key, each in candidates.items() if str(key).strip().startswith("block") == blocks}
        for turn in range(max(map(len, some.values()), default=0)):
            plans.append(plan_graft(model, {key: each[turn] for key, each in some.items() if turn < len(each)}))
    for edit, count in Counter(edit for plan in plans for edit in plan.edits).items():
        if edit.site.kind in ("block_pair", "block_run"):
            raise RuleError(f"A survey tries single blocks, and {edit} takes several. Plan those by hand.")
        if count > 1:
            raise RuleError(f"{edit} stands {count} times among the candidates of one site. Name it once.")
    return plans


def _part(graft: Graft, edits: list[Edit]) -> Graft:
    """Some of a graft's parts by themselves."""
    seats, originals = (
        {edit.site.path: parts[edit.site.path] for edit in edits} for parts in (graft.seats, graft.originals)
    )
    return replace(graft, plan=GraftPlan(graft.plan.model_class, tuple(edits)), seats=seats, originals=originals)


class Exam:
    """Held-out inputs under fixed noise, and what the intact model answers."""

    def __init__(
        self, model: ModelMixin, held_out: Iterable[Batch], noise_scheduler: SchedulerMixin | None, seed: int
    ):
        generator = torch.Generator().manual_seed(seed)
        noising = Noising(scheduler=noise_scheduler, timesteps="uniform", drop_labels=False)
        noised = []
        for batch in held_out:
            noising.require_usable(model, batch)
            noised.append(noising(model, batch, generator))
        if not noised:
            raise TrainingError("There were no held-out batches to judge on.")
        self.inputs, self.targets = [one.inputs for one in noised], [one.target for one in noised]
        self.samples = sum(one.count for one in noised)
        self.answers = self._answers(model)
        self.square = sum(answer.square().sum() for answer in self.answers).item()
        if not 0 < self.square < math.inf:
            answer = "nothing but zeros" if self.square == 0 else "NaN or infinity"
            raise TrainingError(
                f"{type(model).__name__} answers the held-out batches with {answer}, so no change of it can be judged: load "
                "trained weights, in a precision that holds its answers."
            )

    @torch.no_grad()
    def _answers(self, model: ModelMixin) -> list[torch.Tensor]:
        with evaluating(model):
            predictions = [predict(model, inputs) for inputs in self.inputs]
        return [
            (answer if target is None else mean_of(answer, target)).float()
            for answer, target in zip(predictions, self.targets, strict=True)
        ]

    def harm(self, model: ModelMixin, graft: Graft) -> float:
        """Squared error of the model with a graft, relative to the square of the intact model's answer."""
        with with_graft(model, graft):
            pairs = zip(self._answers(model), self.answers, strict=True)
            return sum((new - old).square().sum() for new, old in pairs).item() / self.square


def _savings(
    model: ModelMixin, grafts: list[Graft], inputs: dict[str, Any], rounds: int
) -> dict[Edit, dict[str, float]]:
    """Shares of FLOPs and parameters that every edit saves, and of time: that of its operator at all sites alike
    together.

    A single part is too small a share of a model to be timed by itself. Sites are alike in shape and in what their
    parts cost, since parts of one shape may run on the image, on its prompt, or on a level of a pyramid.
    """
    whole, saved, alike = _counts(model, None, inputs), {}, {}
    for graft in grafts:
        for edit in graft.plan.edits:
            try:
                counts = _counts(model, _part(graft, [edit]), inputs)
            except GraftError as error:
                raise OperatorError(f"{edit} cannot run: {error} Leave that site out of the candidates.") from error
            flops, parameters = (1 - left / all_ for left, all_ in zip(counts, whole, strict=True))
            saved[edit] = {"flops": flops, "parameters": parameters}
            alike.setdefault((graft, edit.config, replace(edit.site, index=0, path=""), counts), []).append(edit)
    parts = {"original": None} | {
        str(number): _part(graft, edits) for number, ((graft, *_), edits) in enumerate(alike.items())
    }
    timings = compare(
        dict.fromkeys(parts, partial(predict, model, inputs)),
        rounds=rounds,
        around=lambda name: with_graft(model, parts[name]),
    )
    for timing in timings[1:]:
        edits = parts[timing.name].plan.edits
        for edit in edits:
            saved[edit]["latency"] = (1 - timing.ratio) / len(edits)
    return saved


def _counts(model: ModelMixin, graft: Graft | None, inputs: dict[str, Any]) -> tuple[int, int]:
    with with_graft(model, graft):
        return count_flops(model, inputs), count_parameters(model)


def _usable(choices: list[Choice]) -> tuple[Choice, ...]:
    """Those whose answers are finite, site by site in forward order, blocks behind their parts."""
    for choice in choices:
        if not math.isfinite(choice.harm):
            logger.warning("%s gives answers that are not finite: it is left out of the survey.", choice.edit)
    order = list(dict.fromkeys(choice.edit.site for choice in choices))  # the first candidates name all sites
    return tuple(
        sorted((c for c in choices if math.isfinite(c.harm)), key=lambda choice: order.index(choice.edit.site))
    )
