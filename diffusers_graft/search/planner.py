"""Which operator goes where: the best design under a budget, from what every choice does and saves by itself.

A choice is an operator at a site. Its *harm* is how far the model's answer moves when this part alone is replaced, as
a squared error, so harms add up as long as parts err independently; together they do somewhat more, the more the
deeper a budget cuts (examples/benchmarks/planner). The plan of the least sum under a budget is a multiple-choice
knapsack, solved
exactly: site by site, every total that no other beats is kept (Nemhauser and Ullmann, 1969). Scores of one part at a
time and a knapsack are how Puzzle (arXiv 2411.19146) designs language models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
from ..injection.graft import Graft, build_graft
from ..planning.plan import Edit, GraftPlan

MEASURES = ("latency", "flops", "parameters")


@dataclass(frozen=True)
class Choice:
    """One operator at one site, which may be a block.

    Attributes:
        edit: the site and the operator.
        harm: squared error of the model's answer with this part alone replaced, relative to the answer's square.
        saved: shares of the whole model's `MEASURES` that it saves; below zero where it costs more.
    """

    edit: Edit
    harm: float
    saved: dict[str, float]


_Option = tuple[int, float, tuple[Choice, ...]]  # saved in billionths, harm, what it takes


class _Totals:
    """Plans that no other beats in harm and in what is saved, from the one that saves most; none at first but the
    original.

    Attributes:
        saved: in billionths of the original's, [plans]: whole numbers, so that equal sums are equal in every order.
        harm: [plans].
        steps: for every place the plan that each of its plans goes on from, and what it takes there.
    """

    def __init__(self):
        self.saved, self.harm = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
        self.steps: list[tuple[torch.Tensor, torch.Tensor, list[tuple[Choice, ...]]]] = []

    @property
    def left(self) -> torch.Tensor:
        """Shares of the original's, [plans]."""
        return 1 - self.saved.double() / 10**9

    def add(self, options: list[_Option]) -> None:
        """Every plan so far, with each of the options at one more place and without."""
        more = torch.tensor([0, *(saved for saved, _, _ in options)])
        worse = torch.tensor([0.0, *(harm for _, harm, _ in options)], dtype=torch.float64)
        saved, harm = (more[:, None] + self.saved).flatten(), (worse[:, None] + self.harm).flatten()
        order = harm.argsort(stable=True)
        order = order[saved[order].argsort(descending=True, stable=True)]
        least = torch.cat([torch.tensor([torch.inf]), harm[order].cummin(0).values[:-1]])
        kept = order[harm[order] < least]
        self.steps.append(
            (kept % len(self.saved), kept // len(self.saved), [(), *(choices for _, _, choices in options)])
        )
        self.saved, self.harm = saved[kept], harm[kept]

    def choices_of(self, plan: int) -> tuple[Choice, ...]:
        """What a plan takes."""
        taken: tuple[Choice, ...] = ()
        for before, chosen, choices in reversed(self.steps):
            taken = choices[chosen[plan]] + taken
            plan = before[plan]
        return taken

    def options(self) -> list[_Option]:
        """The plans, as options at a place of a larger one."""
        return [
            (saved, harm, self.choices_of(plan))
            for plan, (saved, harm) in enumerate(zip(self.saved.tolist(), self.harm.tolist(), strict=True))
        ]


@dataclass(frozen=True)
class Survey(Tabular):
    """What every choice does and saves: measured once (`dg.survey`), solved for any budget in no time.

    Attributes:
        model_class: name of the diffusers class.
        choices: site by site.
        protocol: how it was measured.
        grafts: the very parts that were judged, all of them in memory; not saved.
    """

    model_class: str
    choices: tuple[Choice, ...]
    protocol: dict[str, Any] = field(default_factory=dict)
    grafts: tuple[Graft, ...] = field(default=(), repr=False, compare=False)

    def plan(
        self, *, latency: float | None = None, flops: float | None = None, parameters: float | None = None
    ) -> GraftPlan:
        """The plan that leaves at most a share of the original's latency, FLOPs or parameters, at the least sum of
        harms.

        Args:
            latency, flops, parameters: the budget, one of them: 0.8 is 80 % of the original's.

        Raises `GraftError` for a budget that is none, or that no plan meets.
        """
        budgets = {"latency": latency, "flops": flops, "parameters": parameters}
        asked = {measure: share for measure, share in budgets.items() if share is not None}
        if len(asked) != 1:
            raise GraftError(f"A plan has one budget, such as latency=0.8; got {asked or 'none'}.")
        ((measure, share),) = asked.items()
        if not isinstance(share, Real) or not 0 < share < 1:
            raise GraftError(f"A budget is a share of the original's {measure}, between 0 and 1; got {share!r}.")
        totals = self._totals(measure)
        enough = int((totals.saved >= round(10**9 * (1 - share))).sum())  # so many of the first
        if not enough:
            least = math.ceil(10**4 * totals.left[0].item()) / 10**4  # rounded up, so that it can be asked for
            raise GraftError(f"No plan leaves {share:g} of the {measure}: with these choices {least} is the least.")
        taken = {choice.edit for choice in totals.choices_of(enough - 1)}
        return GraftPlan(self.model_class, tuple(choice.edit for choice in self.choices if choice.edit in taken))

    def front(self, measure: str = "latency") -> list[tuple[float, float]]:
        """What is to be had: shares of the original's that plans leave, falling to the least, and their least sums of
        harms.

        Raises `UnknownNameError` for a measure that there is not.
        """
        totals = self._totals(measure)
        return list(zip(totals.left.tolist(), totals.harm.tolist(), strict=True))[::-1]

    def predicted(self, plan: GraftPlan) -> dict[str, float]:
        """`harm` of a plan, and what it leaves of the `MEASURES`: sums over its choices, which may do more harm
        together.

        Raises `GraftError` for an edit that was not surveyed.
        """
        known = {choice.edit: choice for choice in self.choices}
        if missing := next((edit for edit in plan.edits if edit not in known), None):
            tried = ", ".join(str(edit.config) for edit in known if edit.site == missing.site)
            raise GraftError(
                f"The survey did not try {missing}. There it tried {tried or 'nothing'}: choose among that."
            )
        chosen = [known[edit] for edit in plan.edits]
        left = {measure: 1 - sum(choice.saved[measure] for choice in chosen) for measure in MEASURES}
        return {"harm": sum(choice.harm for choice in chosen), **left}

    def graft(self, model: ModelMixin, plan: GraftPlan) -> Graft:
        """A graft of the parts that were judged, copied: what `dg.survey` taught them is not lost.

        Raises `StateError` for a survey that was read from a file, `MismatchError` for a model whose parts have other
        weights than those that were surveyed, `GraftError` for an edit that was not surveyed, and what `build_graft`
        raises.
        """
        if not self.grafts:
            raise StateError(
                "A survey from a file holds no parts: call dg.build_graft(model, plan) and distil the graft, or dg.survey as "
                "before, with its output_dir and resume=True."
            )
        graft = build_graft(model, plan)
        self.predicted(plan)
        for judged in self.grafts:
            sites = [edit.site for edit in plan.edits if edit in judged.plan.edits]
            addresses = {site.address for site in sites}
            for path in (site.path for site in sites):
                _require_alike(path, judged.originals[path], graft.originals[path])
                own = judged.tensors_of(path)
                graft.untie(path, {name.partition(".")[0] for name in own})
                for name, tensor in graft.tensors_of(path).items():
                    tensor.data.copy_(own[name])
            for row in judged.history if sites else ():
                graft.history.append({**row, "sites": [told for told in row["sites"] if told["site"] in addresses]})
        return graft

    def save(self, path: str | Path) -> None:
        """Write it as JSON, without the parts. Raises `FileError` for a path that cannot be written."""
        tried = GraftPlan(self.model_class, tuple(choice.edit for choice in self.choices))
        scores = [{"harm": choice.harm, "saved": choice.saved} for choice in self.choices]
        write_json(path, {**tried.to_dict(), "scores": scores, "protocol": self.protocol})

    @classmethod
    def load(cls, path: str | Path) -> Survey:
        """Raises `FileError` for a file that is missing or no survey."""
        try:
            data = read_json(path)
            tried = GraftPlan.from_dict(data)
            scores = zip(tried.edits, data["scores"], strict=True)
            choices = tuple(
                Choice(edit, _finite(row["harm"]), {name: _finite(row["saved"][name]) for name in MEASURES})
                for edit, row in scores
            )
            return cls(tried.model_class, choices, dict(data["protocol"]))
        except (GraftError, KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path} is no survey that can be read: {error!r}. A survey is what Survey.save wrote."
            ) from error

    def _totals(self, measure: str) -> _Totals:
        """Raises `UnknownNameError` for a measure that there is not."""
        if measure not in MEASURES:
            raise UnknownNameError("measure", measure, MEASURES)
        places: dict[Site, list[_Option]] = {}
        for choice in self.choices:
            option = round(10**9 * choice.saved[measure]), choice.harm, (choice,)
            places.setdefault(choice.edit.site, []).append(option)
        for block in [site for site in places if site.kind == "block"]:  # taken as a whole, or parts of it
            within = _Totals()
            for site in [site for site in places if site.path.startswith(f"{block.path}.")]:
                within.add(places.pop(site))
            places[block] += within.options()
        totals = _Totals()
        for options in places.values():
            totals.add(options)
        return totals

    def to_table(self) -> Table:
        """Return the table that `str` shows."""
        heading = ("site", "operator", "harm", *MEASURES)
        rows = []
        for choice in self.choices:
            changes = [f"{0 - choice.saved[measure]:+.2%}" for measure in MEASURES]
            rows.append((choice.edit.site.address, str(choice.edit.config), f"{choice.harm:.2e}", *changes))
        return Table(rows, heading=heading, numbers=range(2, len(heading)))


def _require_alike(path: str, surveyed: nn.Module, original: nn.Module) -> None:
    """Raise `MismatchError` unless two parts are one, or have the same weights."""
    before, now = surveyed.state_dict(), original.state_dict()
    if surveyed is not original and not (
        before.keys() == now.keys()
        and all(torch.equal(tensor, before[name].to(tensor)) for name, tensor in now.items())
    ):
        raise MismatchError(
            f"{path} has other weights than in the model that was surveyed, from which its new part learned. Survey this "
            "model, or give that one; the plan by itself suits both: dg.build_graft(model, plan)."
        )


def _finite(number: Any) -> float:
    """Raises `ValueError` for what is none."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return float(number)
