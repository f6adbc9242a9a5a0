"""Plans whose parts affect each other, by changes of one or two places at a time.

Part i alone moves the model's answer by e_i, and several parts, to the first order, by the sum of theirs. So a plan's
harm is |sum_i e_i|^2: the sum of the harms |e_i|^2, and twice the inner product of every pair. These are known as soon
as every part was tried alone. The knapsack with such pairs is hard (Gallo, Hammer and Simeone, 1980): the plan of the
least sum of harms is exact, and from there a place and another change together while that helps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .knapsack import Option


class Swaps:
    """The options of all places in one row, leaving each place as it is among them, with the inner products of pairs.

    A plan is the number of the option in use at every place, [places].
    """

    def __init__(self, places: Sequence[Sequence[Option]], products: torch.Tensor):
        """Write the options in a row.

        Args:
            places: with options that consist of choices by their number.
            products: inner products of what choices do to the answer, [choices, choices].
        """
        self._options: list[Option] = []
        place_of = []
        for place, options in enumerate(places):
            row = [Option(0, 0.0, ()), *options]
            self._options += row
            place_of += [place] * len(row)
        self._places = len(places)
        self._place_of = torch.tensor(place_of)
        self._saved = torch.tensor([option.saved for option in self._options])
        held = []
        holders = []
        for number, option in enumerate(self._options):
            held += option.choices
            holders += [number] * len(option.choices)
        # sums over the choices of an option, first of rows, then of columns
        rows = torch.zeros(len(self._options), len(products), dtype=products.dtype)
        rows.index_add_(0, torch.tensor(holders), products[held])
        self._products = torch.zeros(len(self._options), len(self._options), dtype=products.dtype)
        self._products.index_add_(1, torch.tensor(holders), rows[:, held])

    def plan_of(self, choices: Sequence[int]) -> torch.Tensor:
        """Return the plan that consists of some choices."""
        chosen = set(choices)
        plan = torch.zeros(self._places, dtype=torch.int64)
        for number, option in enumerate(self._options):
            present = self._options[plan[self._place_of[number]]]
            # of the options within the choices, the largest: a block's hold one another
            if chosen.issuperset(option.choices) and len(option.choices) >= len(present.choices):
                plan[self._place_of[number]] = number
        return plan

    def choices_of(self, plan: torch.Tensor) -> tuple[int, ...]:
        """Return what a plan consists of."""
        return tuple(choice for number in plan.tolist() for choice in self._options[number].choices)

    def harm(self, plan: torch.Tensor) -> float:
        """Return what the parts of a plan do together."""
        return self._products[plan][:, plan].sum().item()

    def improve(self, plan: torch.Tensor, needed: int) -> torch.Tensor:
        """Change one or two places at a time until no such change lowers the harm and saves what is needed."""
        while True:
            before = plan
            for place in range(self._places):
                changes = self._changes(plan, place, needed)
                best = int(changes.argmin())
                changed = self._changed(plan, place, best)
                # harm itself has to fall, so that no plan comes back: a change may be rounding
                if changes.flatten()[best] < 0 and self.harm(changed) < self.harm(plan):
                    plan = changed
            if torch.equal(plan, before):
                return plan

    def rivals(self, plan: torch.Tensor, needed: int, count: int) -> list[torch.Tensor]:
        """Return the plans with one or two other places whose predicted harm is the least, best first."""
        found: dict[tuple[int, ...], tuple[float, torch.Tensor]] = {}
        for place in range(self._places):
            changes = self._changes(plan, place, needed).flatten()
            # every change of two places is found from both, and the plan itself is among them
            least = changes.topk(min(2 * count + 1, len(changes)), largest=False)
            for change, number in zip(least.values.tolist(), least.indices.tolist(), strict=True):
                rival = self._changed(plan, place, number)
                if change < torch.inf and not torch.equal(rival, plan):
                    found[tuple(rival.tolist())] = (change, rival)
        ranked = sorted(found.values(), key=lambda entry: entry[0])
        return [rival for _, rival in ranked[:count]]

    def _changes(self, plan: torch.Tensor, place: int, needed: int) -> torch.Tensor:
        """Return how harm changes with another option at a place, and another one anywhere.

        Returns [options of the place, options of all places], infinite where a plan would save too little.
        """
        here = (self._place_of == place).nonzero()[:, 0]
        present = plan[self._place_of]
        products = self._products
        squares = products.diagonal()
        # |d + e - f|^2 - |d|^2 for an option e in the place of f, where the plan moves the answer by d
        along = products[:, plan].sum(1)
        crossing = products[torch.arange(len(present)), present]
        alone = 2 * (along - along[present]) + squares + squares[present] - 2 * crossing
        both = products[here] - products[here][:, present]
        both = both - products[plan[place]] + products[plan[place]][present]
        changes = alone[here, None] + alone + 2 * both
        gained = self._saved - self._saved[present]
        saves = self._saved[plan].sum() + gained[here, None] + gained
        is_other = (self._place_of != place) | (torch.arange(len(present)) == plan[place])
        return changes.masked_fill((saves < needed) | ~is_other, torch.inf)

    def _changed(self, plan: torch.Tensor, place: int, number: int) -> torch.Tensor:
        """Return the plan after a change, by its number among those of a place."""
        row, column = divmod(number, len(self._place_of))
        first = int((self._place_of == place).nonzero()[0])
        plan = plan.clone()
        # the other place first: it may be this one, left as it is
        plan[self._place_of[column]] = column
        plan[place] = first + row
        return plan
