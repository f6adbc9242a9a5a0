"""The solver of `Survey.plan`: a multiple-choice knapsack, at most one option at every place.

Plans grow place by place, and a plan survives while no other has both less harm and more saved (Nemhauser and Ullmann,
1969). That is exact. Two things bound the work where harm follows what is saved, so that almost nothing is beaten:

- Under a budget, a plan is dropped once a Lagrangian bound shows that no completion of it can be better than a plan
  that is known already. This is exact, too.
- While more than `LARGEST_FRONT` plans are alive, plans whose harms differ by less than a factor `growth` count as
  equal, and the one that saves most survives. The factors of all places multiply to at most 1 + tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

UNITS = 10**9  # of what is saved, as integers, so that equal sums are equal in every order
LARGEST_FRONT = 4096
TOLERANCE = 0.01


@dataclass(frozen=True)
class Option:
    """One way to fill a place.

    Attributes:
        saved: share of the total cost that it saves, in `UNITS`; below zero where it costs more.
        harm: what it costs in quality, zero or more.
        choices: what a plan that uses it consists of.
    """

    saved: int
    harm: float
    choices: tuple[Any, ...]


class Bound:
    """A lower bound on the harm of every completion of a partial plan, from Lagrange's relaxation of one budget.

    Attributes:
        needed: what a plan must save, in `UNITS`.
        known: harm of a plan that meets the budget.
        least: no plan that meets the budget has less harm.
        price: harm that is paid for one unit saved.
    """

    def __init__(self, places: Sequence[Sequence[Option]], needed: int):
        """Find the best price. The places must be able to save what is needed."""
        # padded with options that are never the cheapest; the first one leaves the place as it is
        width = 1 + max(map(len, places))
        saved = torch.zeros(len(places), width, dtype=torch.float64)
        harm = torch.full((len(places), width), torch.inf, dtype=torch.float64)
        harm[:, 0] = 0
        for row, options in enumerate(places):
            for column, option in enumerate(options, start=1):
                saved[row, column] = option.saved
                harm[row, column] = option.harm
        self._saved = saved
        self._harm = harm
        self.needed = needed
        self.price = self._find_price()
        net, _, self.known = self._cheapest(self.price)
        self.least = net.sum().item() + self.price * needed
        # what the places behind the first, the second, ... add at the least
        self._rest = [*net.flip(0).cumsum(0).flip(0).tolist()[1:], 0.0]

    def admits(self, saved: torch.Tensor, harm: torch.Tensor, place: int) -> torch.Tensor:
        """Return which partial plans may still become the best one.

        Args:
            saved, harm: of plans over the places up to `place`, [plans].
        """
        least = harm + self.price * (self.needed - saved.double()) + self._rest[place]
        # for rounding: the best plan itself must pass
        slack = 1e-9 * (self.known + self.price * self.needed)
        return least <= self.known + slack

    def _find_price(self) -> float:
        """Return a price at which the cheapest options save what is needed, and at half a bit less they do not."""
        if self._cheapest(0.0)[1] >= self.needed:
            return 0.0
        # harms are relative squares, so prices span many magnitudes
        high = 1e-30
        while self._cheapest(high)[1] < self.needed:
            high *= 2
        low = high / 2
        for _ in range(50):
            middle = (low + high) / 2
            if self._cheapest(middle)[1] < self.needed:
                low = middle
            else:
                high = middle
        return high

    def _cheapest(self, price: float) -> tuple[torch.Tensor, float, float]:
        """Return the cheapest option's net price at every place, and what these options save and harm together."""
        net, chosen = (self._harm - price * self._saved).min(1)
        saved = self._saved.gather(1, chosen[:, None]).sum().item()
        harm = self._harm.gather(1, chosen[:, None]).sum().item()
        return net, saved, harm


class Front:
    """Plans that no other plan beats in both harm and saving, from the one that saves most to the empty one.

    Attributes:
        saved: of every plan, in `UNITS`: [plans], falling.
        harm: of every plan: [plans], falling.
        is_exact: no two plans counted as equal.
        size: plans that were alive, summed over the places: the work that was done.
    """

    def __init__(self):
        self.saved = torch.zeros(1, dtype=torch.int64)
        self.harm = torch.zeros(1, dtype=torch.float64)
        self.is_exact = True
        self.size = 0
        # of every place: the plan that each plan continues, the option it uses there, and the options
        self._steps: list[tuple[torch.Tensor, torch.Tensor, Sequence[Option]]] = []

    def add(self, options: Sequence[Option], *, growth: float, bound: Bound | None = None) -> None:
        """Continue every plan with each option of one more place, and without any.

        Args:
            options: of the place.
            growth: relative difference of harms that is overlooked while too many plans are alive.
            bound: drops the plans that cannot become the best one.
        """
        more = torch.tensor([0, *(option.saved for option in options)])
        worse = torch.tensor([0.0, *(option.harm for option in options)], dtype=torch.float64)
        saved = (more[:, None] + self.saved).flatten()
        harm = (worse[:, None] + self.harm).flatten()
        alive = torch.arange(len(saved))
        if bound is not None:
            alive = alive[bound.admits(saved, harm, len(self._steps))]
        alive = alive[_unbeaten(saved[alive], harm[alive])]
        if len(alive) > LARGEST_FRONT:
            alive = alive[_distinct(harm[alive], growth)]
            self.is_exact = False
        self._steps.append((alive % len(self.saved), alive // len(self.saved), options))
        self.saved = saved[alive]
        self.harm = harm[alive]
        self.size += len(alive)

    def choices_of(self, plan: int) -> tuple[Any, ...]:
        """Return what a plan consists of, by its place on the front."""
        choices: tuple[Any, ...] = ()
        for continued, used, options in reversed(self._steps):
            option = int(used[plan])
            if option:  # 0 leaves the place as it is
                choices = options[option - 1].choices + choices
            plan = int(continued[plan])
        return choices

    def options(self) -> list[Option]:
        """Return the plans as options of one place of a larger problem."""
        saved = self.saved.tolist()
        harm = self.harm.tolist()
        return [Option(saved[plan], harm[plan], self.choices_of(plan)) for plan in range(len(saved))]


def front_of(places: Sequence[Sequence[Option]], *, tolerance: float = TOLERANCE, bound: Bound | None = None) -> Front:
    """Return the front of all plans, or with a bound the part of it that may hold the best plan.

    The harm at any saving is at most 1 + `tolerance` times the least; it is the least where the front `is_exact`.
    """
    growth = (1 + tolerance) ** (1 / max(1, len(places))) - 1
    front = Front()
    for options in places:
        front.add(options, growth=growth, bound=bound)
    return front


def best_plan(places: Sequence[Sequence[Option]], needed: int) -> tuple[tuple[Any, ...], bool]:
    """Return the choices of least harm that save what is needed, and whether their harm is exactly the least.

    Where it is not known to be, it is at most 1 + `TOLERANCE` times the least.

    Args:
        places: with the options of each; they must be able to save what is needed.
        needed: in `UNITS`.
    """
    bound = Bound(places, needed)
    # a coarse pass first: a better known plan makes the bound drop more in the fine one
    for tolerance in (10 * TOLERANCE, TOLERANCE):
        front = front_of(places, tolerance=tolerance, bound=bound)
        last = int((front.saved >= needed).sum()) - 1  # savings fall, harms too
        bound.known = front.harm[last].item()
        if front.is_exact or bound.known <= (1 + TOLERANCE / 2) * bound.least:
            break
    return front.choices_of(last), front.is_exact


def _unbeaten(saved: torch.Tensor, harm: torch.Tensor) -> torch.Tensor:
    """Return the plans that no other beats, by falling saving."""
    # a plan is beaten by those before it, which save as much or more, if one has no more harm
    order = saved.argsort(descending=True, stable=True)
    least_before = torch.cat([torch.tensor([torch.inf]), harm[order].cummin(0).values[:-1]])
    order = order[harm[order] < least_before]
    # of plans that save the same, the last has the least harm
    is_last = torch.ones(len(order), dtype=torch.bool)
    is_last[:-1] = saved[order][:-1] != saved[order][1:]
    return order[is_last]


def _distinct(harm: torch.Tensor, growth: float) -> torch.Tensor:
    """Return which plans of a front stay when harms within a factor 1 + growth count as equal: the first, larger."""
    cells = (harm.log() / math.log1p(growth)).floor()  # zero harm has a cell for itself, minus infinity
    is_first = torch.ones(len(harm), dtype=torch.bool)
    is_first[1:] = cells[1:] != cells[:-1]
    return is_first
