"""The best plan under a budget, from the effect of every choice by itself.

A choice is an operator at a site. Its *harm* is how far the model's answer moves when this part alone is replaced, as
a squared error. Harms add up as long as parts err independently; where they move the answer in the same direction,
they do more together, and the cosines of their movements say how much (swaps.py). Scores of one part at a time and a
knapsack over them are how Puzzle (arXiv 2411.19146) designs language models; the solver is in knapsack.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ..core.sites import Site
from ..core.storage import read_json, write_json
from ..core.tables import Table, Tabular
from ..errors import FileError, GraftError, MismatchError, StateError, UnknownNameError
from ..evaluation.benchmark import compare, with_graft
from ..evaluation.cost import count_flops, count_parameters
from ..injection.graft import Graft, build_graft
from ..inspection import evaluating, predict
from ..planning.plan import Edit, GraftPlan
from .judge import HarmJudge
from .knapsack import TOLERANCE, UNITS, Option, best_plan, front_of
from .swaps import Swaps

logger = logging.getLogger(__name__)

MEASURES = ("latency", "flops", "parameters")


@dataclass(frozen=True)
class Choice:
    """An operator at a site, which may be a block, with its harm and savings.

    Attributes:
        edit: the site and the operator.
        harm: squared error of the model's answer with this part alone replaced, relative to the answer's square.
        saved: shares of the model's `MEASURES` that it saves; below zero where it costs more.
    """

    edit: Edit
    harm: float
    saved: dict[str, float]


@dataclass(frozen=True)
class Survey(Tabular):
    """The harm and the savings of every choice: measured once (`dg.survey`), then solved for any budget.

    Attributes:
        model_class: name of the diffusers class.
        choices: site by site.
        protocol: settings of the measurement.
        cosines: of the answer's movements by two choices, a row a choice with those of the choices before it. Without
            them harms are added up.
        grafts: the parts that were judged, all of them in memory; not saved.
        judge: measured them; not saved.
    """

    model_class: str
    choices: tuple[Choice, ...]
    protocol: dict[str, Any] = field(default_factory=dict)
    cosines: tuple[tuple[float, ...], ...] = ()
    grafts: tuple[Graft, ...] = field(default=(), repr=False, compare=False)
    judge: HarmJudge | None = field(default=None, repr=False, compare=False)

    def plan(
        self,
        *,
        latency: float | None = None,
        flops: float | None = None,
        parameters: float | None = None,
        model: ModelMixin | None = None,
        trials: int = 16,
    ) -> GraftPlan:
        """Choose the plan of the least harm that meets a budget.

        First it solves for the least sum of harms. Where so many plans compete that the proof would take long, the sum
        is at most 1 % above the least, and an info line of the log says so. Then it changes one or two sites at a
        time, until no such change makes the parts do less harm together.

        Args:
            latency, flops, parameters: the budget, one of them: 0.8 leaves 80 % of the original's.
            model: the model that was surveyed. If given, the plan and its nearest rivals are measured on it, and the
                one with the least measured harm is chosen.
            trials: plans that are measured at most; each costs a forward of the held-out batches.

        Raises:
            GraftError: anything else than one share between 0 and 1, or one that no plan meets; no trial.
            StateError: `model` is given and the survey was read from a file; and what `graft` raises.
        """
        measure, share = check_budget({"latency": latency, "flops": flops, "parameters": parameters})
        self.require_reachable({measure: share})
        needed = round(UNITS * (1 - share))
        places = self._places(measure)
        choices, is_exact = best_plan(places, needed)
        if not is_exact:
            logger.info("The sum of harms of this plan is at most %.0f %% above the least.", 100 * TOLERANCE)
        swaps = Swaps(places, self._products())
        solved = swaps.improve(swaps.plan_of(choices), needed)
        if model is None:
            return self._plan_of(swaps.choices_of(solved))
        if type(trials) is not int or trials < 1:
            raise GraftError(f"A plan is measured in 1 trial or more; got {trials!r}.")
        return self._least_harmful(model, swaps, solved, needed, trials)

    def front(self, measure: str = "latency") -> list[tuple[float, float]]:
        """Return the shares of the original's that plans leave, falling, and the least sum of harms at each.

        Of large surveys some plans are left out, and sums are at most 10 % above the least.

        Raises `UnknownNameError` for anything but one of the `MEASURES`.
        """
        front = front_of(self._places(measure), tolerance=10 * TOLERANCE)
        left = 1 - front.saved.double() / UNITS
        return list(zip(left.tolist(), front.harm.tolist(), strict=True))[::-1]

    def predicted(self, plan: GraftPlan) -> dict[str, float]:
        """Return the `harm` of a plan and the shares of the `MEASURES` it leaves, from those of its choices.

        Raises `GraftError` for an edit that was not surveyed.
        """
        known = {choice.edit: number for number, choice in enumerate(self.choices)}
        for edit in plan.edits:
            if edit not in known:
                tried = ", ".join(str(other.config) for other in known if other.site == edit.site)
                raise GraftError(
                    f"The survey did not try {edit}. There it tried {tried or 'nothing'}: choose among that."
                )
        return self.predict([known[edit] for edit in plan.edits])

    def predict(self, numbers: Sequence[int]) -> dict[str, float]:
        """Return what `predicted` does, for choices by their number."""
        products = self._products()[numbers][:, numbers]
        predicted = {"harm": products.sum().item()}
        for measure in MEASURES:
            predicted[measure] = 1 - sum(self.choices[number].saved[measure] for number in numbers)
        return predicted

    def measure(self, model: ModelMixin, plan: GraftPlan, *, rounds: int = 7) -> dict[str, float]:
        """Measure what `predicted` predicts, with the parts that were judged.

        Args:
            model: that was surveyed.
            rounds: timed runs.

        Raises what `graft` does.
        """
        graft = self.graft(model, plan)
        judge = self._require_judge()
        inputs = judge.inputs[0]
        with evaluating(model), torch.no_grad():
            grafts: dict[str, Graft | None] = {"original": None, "plan": graft}
            runs = dict.fromkeys(grafts, partial(predict, model, inputs))
            _, timing = compare(runs, rounds=rounds, around=lambda name: with_graft(model, grafts[name]))
            flops = count_flops(model, inputs)
            parameters = count_parameters(model)
            with with_graft(model, graft):
                flops = count_flops(model, inputs) / flops
                parameters = count_parameters(model) / parameters
        harm = judge.harm(model, graft)
        return {"harm": harm, "latency": timing.ratio, "flops": flops, "parameters": parameters}

    def correct(self, model: ModelMixin, plan: GraftPlan, *, rounds: int = 7) -> Survey:
        """Measure a plan, and return a survey that predicts for it what was measured.

        Latencies that are saved, and what parts do to each other, are multiplied by one factor each. So a plan that is
        solved once more meets its budget of latency as closely as the corrected prediction:

            survey = survey.correct(model, survey.plan(latency=0.8))
            plan = survey.plan(latency=0.8)

        Args, Raises: as `measure`.
        """
        predicted = self.predicted(plan)
        measured = self.measure(model, plan, rounds=rounds)
        faster = 1.0
        if predicted["latency"] != 1:
            # a plan that saves nothing, or costs more, says nothing of what parts save
            faster = max(0.5, min(2.0, (1 - measured["latency"]) / (1 - predicted["latency"])))
        alone = sum(choice.harm for choice in self.choices if choice.edit in plan.edits)
        together = predicted["harm"] - alone
        stronger = 1.0
        if abs(together) > 1e-3 * alone:
            stronger = max(0.0, min(4.0, (measured["harm"] - alone) / together))
        choices = []
        for choice in self.choices:
            saved = {**choice.saved, "latency": faster * choice.saved["latency"]}
            choices.append(replace(choice, saved=saved))
        cosines = tuple(tuple(stronger * cosine for cosine in row) for row in self.cosines)
        corrected = {**self.protocol, "corrected": {"latency": faster, "cosines": stronger}}
        return replace(self, choices=tuple(choices), cosines=cosines, protocol=corrected)

    def graft(self, model: ModelMixin, plan: GraftPlan) -> Graft:
        """Build a graft from copies of the parts that were judged, with what stage one of `dg.survey` trained.

        Raises:
            StateError: a survey that was read from a file.
            MismatchError: a model whose parts have other weights than those that were surveyed.
            GraftError: an edit that was not surveyed; and what `build_graft` raises.
        """
        if not self.grafts:
            raise StateError(
                "A survey from a file holds no parts: call dg.build_graft(model, plan) and distil the graft, or "
                "dg.survey as before, with its output_dir and resume=True."
            )
        # Raises for edits that were not surveyed, before anything is built.
        self.predicted(plan)
        graft = build_graft(model, plan)
        for judged in self.grafts:
            sites = [edit.site for edit in plan.edits if edit in judged.plan.edits]
            for site in sites:
                _copy_part(judged, graft, site.path)
            addresses = {site.address for site in sites}
            if addresses:
                graft.history.extend(_rows_of(judged.history, addresses))
        return graft

    def save(self, path: str | Path) -> None:
        """Write the survey as JSON, without the parts. Raises `FileError` for a path that cannot be written."""
        tried = GraftPlan(self.model_class, tuple(choice.edit for choice in self.choices))
        scores = [{"harm": choice.harm, "saved": choice.saved} for choice in self.choices]
        found = {"scores": scores, "cosines": self.cosines, "protocol": self.protocol}
        write_json(path, {**tried.to_dict(), **found})

    @classmethod
    def load(cls, path: str | Path) -> Survey:
        """Read what `save` wrote. Raises `FileError` for a file that is missing or no survey."""
        try:
            data = read_json(path)
            choices = []
            for row, scores in zip(data["edits"], data["scores"], strict=True):
                # one by one, since a plan holds a site once
                plan = GraftPlan.from_dict({**data, "edits": [row]})
                saved = {measure: _finite(scores["saved"][measure]) for measure in MEASURES}
                choices.append(Choice(plan.edits[0], _finite(scores["harm"]), saved))
            model_class = GraftPlan.from_dict({**data, "edits": []}).model_class
            # surveys of earlier versions have no cosines
            cosines = tuple(tuple(map(_finite, row)) for row in data.get("cosines", ()))
            if cosines and [len(row) for row in cosines] != list(range(len(choices))):
                raise ValueError("cosines are of other choices")
            return cls(model_class, tuple(choices), dict(data["protocol"]), cosines)
        except (GraftError, KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path} is not a survey that can be read: {error!r}. A survey is what Survey.save wrote."
            ) from error

    def is_reachable(self, budget: Mapping[str, float]) -> bool:
        """Return whether a plan meets a budget, such as `{"flops": 0.8}`. Raises `GraftError` for anything else."""
        measure, share = check_budget(budget)
        return self._most_saved(measure) >= round(UNITS * (1 - share))

    def _most_saved(self, measure: str) -> int:
        """Return what can be saved at most, in `UNITS`."""
        return sum(max(0, *(option.saved for option in options)) for options in self._places(measure))

    def require_reachable(self, budget: Mapping[str, float]) -> None:
        """Raise `GraftError` where no plan meets a budget, such as `{"flops": 0.8}`."""
        if not self.is_reachable(budget):
            measure, share = check_budget(budget)
            # rounded up, so that this share itself can be met
            least = math.ceil(10**4 * (1 - self._most_saved(measure) / UNITS)) / 10**4
            raise GraftError(f"No plan leaves {share:g} of the {measure}: with these choices {least} is the least.")

    def _least_harmful(
        self, model: ModelMixin, swaps: Swaps, solved: torch.Tensor, needed: int, trials: int
    ) -> GraftPlan:
        """Return the plan that does the least harm of those that the model measures.

        The nearest rivals of a plan are measured, best first, and the first that is better takes its place.
        """
        judge = self._require_judge()
        best = self._plan_of(swaps.choices_of(solved))
        least = judge.harm(model, self.graft(model, best))
        measured = {best}
        rivals = swaps.rivals(solved, needed, trials)
        while rivals and len(measured) < trials:
            rival = rivals.pop(0)
            plan = self._plan_of(swaps.choices_of(rival))
            if plan in measured:
                continue
            measured.add(plan)
            harm = judge.harm(model, self.graft(model, plan))
            if harm < least:
                best = plan
                least = harm
                rivals = swaps.rivals(rival, needed, trials)
        return best

    def _require_judge(self) -> HarmJudge:
        """Return what measures harm. Raises `StateError` for a survey from a file."""
        if self.judge is None:
            raise StateError("A survey from a file cannot measure plans: call dg.survey as before.")
        return self.judge

    def _plan_of(self, numbers: Sequence[int]) -> GraftPlan:
        """Return the plan of choices by their number, in the order of the survey, which is that of the forward."""
        return GraftPlan(self.model_class, tuple(self.choices[number].edit for number in sorted(numbers)))

    def _products(self) -> torch.Tensor:
        """Return the inner products of the answer's movements by any two choices, [choices, choices]."""
        sizes = torch.tensor([choice.harm for choice in self.choices], dtype=torch.float64).sqrt()
        cosines = torch.eye(len(sizes), dtype=torch.float64)
        for number, row in enumerate(self.cosines):
            cosines[number, :number] = torch.tensor(row, dtype=torch.float64)
        return (cosines + cosines.tril(-1).T) * sizes * sizes[:, None]

    def _places(self, measure: str) -> list[list[Option]]:
        """Return the options of every place, where a block that may be replaced is one place with its parts.

        Raises `UnknownNameError` for anything but one of the `MEASURES`.
        """
        if measure not in MEASURES:
            raise UnknownNameError("measure", measure, MEASURES)
        places: dict[Site, list[Option]] = {}
        for number, choice in enumerate(self.choices):
            option = Option(round(UNITS * choice.saved[measure]), choice.harm, (number,))
            places.setdefault(choice.edit.site, []).append(option)
        for block in [site for site in places if site.kind == "block"]:
            # a block is replaced as one, or some of its parts are: plans for the parts are options of the block, too
            parts = [site for site in places if site.path.startswith(f"{block.path}.")]
            within = front_of([places.pop(site) for site in parts])
            places[block] += within.options()
        return list(places.values())

    def to_table(self) -> Table:
        """Return the table that `str` shows: a row a choice, changes of the measures in per cent."""
        heading = ("site", "operator", "harm", *MEASURES)
        rows = []
        for choice in self.choices:
            # subtracted, since the negative of zero would be shown as -0.00%
            changes = [f"{0 - choice.saved[measure]:+.2%}" for measure in MEASURES]
            rows.append((choice.edit.site.address, str(choice.edit.config), f"{choice.harm:.2e}", *changes))
        return Table(rows, heading=heading, numbers=range(2, len(heading)))


def check_budget(budgets: Mapping[str, Any]) -> tuple[str, float]:
    """Return the measure and the share of the only budget that is given. Raises `GraftError` for anything else."""
    given = {measure: share for measure, share in budgets.items() if share is not None}
    for measure in given:
        if measure not in MEASURES:
            raise UnknownNameError("measure", measure, MEASURES)
    if len(given) != 1:
        raise GraftError(f"A plan has one budget, such as latency=0.8; got {given or 'none'}.")
    ((measure, share),) = given.items()
    if not isinstance(share, Real) or not 0 < share < 1:  # pyright: ignore[reportOperatorIssue]  # Real declares no <
        raise GraftError(f"A budget is a share of the original's {measure}, between 0 and 1; got {share!r}.")
    return measure, float(share)


def _copy_part(judged: Graft, graft: Graft, path: str) -> None:
    """Copy the trained values of one part from the graft that was judged into another."""
    _require_same_weights(path, judged.originals[path], graft.originals[path])
    trained = judged.tensors_of(path)
    # a tensor that still belongs to the original must not be written to
    graft.untie(path, {name.partition(".")[0] for name in trained})
    for name, tensor in graft.tensors_of(path).items():
        tensor.data.copy_(trained[name])


def _rows_of(history: list[dict[str, Any]], addresses: set[str]) -> list[dict[str, Any]]:
    """Return a history with the rows of some sites alone."""
    rows = []
    for stage in history:
        sites = [row for row in stage["sites"] if row["site"] in addresses]
        rows.append({**stage, "sites": sites})
    return rows


def _require_same_weights(path: str, surveyed: nn.Module, original: nn.Module) -> None:
    """Raise `MismatchError` unless two parts are one module, or have the same weights."""
    if surveyed is original:
        return
    before = surveyed.state_dict()
    now = original.state_dict()
    if before.keys() != now.keys() or not all(torch.equal(now[name], before[name].to(now[name])) for name in now):
        raise MismatchError(
            f"{path} has other weights than in the model that was surveyed, from which its new part learned. "
            "Survey this model, or give that one; the plan by itself suits both: dg.build_graft(model, plan)."
        )


def _finite(number: Any) -> float:
    """Return a number as a float. Raises `ValueError` for one that is not finite."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return float(number)
