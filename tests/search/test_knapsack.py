"""The solver of plans under a budget, against trying all plans and against a bound from below."""

import itertools
import random

import pytest

from diffusers_graft.search import knapsack
from diffusers_graft.search.knapsack import TOLERANCE, UNITS, Bound, Front, Option, best_plan, front_of


def totals(plan):
    return sum(option.saved for option in plan), sum(option.harm for option in plan)


def large_problem(seed, harm_of):
    """150 places of 10 options, whose harm follows what they save, so that hardly any plan beats another."""
    draw = random.Random(seed)
    places = []
    for place in range(150):
        shares = [draw.uniform(0, 1 / 150) for _ in range(10)]
        places.append([Option(round(UNITS * share), harm_of(share, draw), (place, share)) for share in shares])
    return places


@pytest.mark.parametrize("seed", range(20))
def test_the_best_plan_is_the_best_of_all_plans(seed):
    draw = random.Random(seed)
    harms = (0.0, draw.uniform(0, 10), draw.uniform(0, 1e-8), draw.uniform(0, 1e-300))
    places = []
    for place in range(draw.randint(1, 4)):
        savings = [draw.randint(-3, 12) * UNITS // 100 for _ in range(draw.randint(1, 3))]
        places.append([Option(saved, draw.choice(harms), ((place, n),)) for n, saved in enumerate(savings)])
    plans = [[option for option in plan if option] for plan in itertools.product(*([None, *some] for some in places))]
    most = max(totals(plan)[0] for plan in plans)
    for needed in {most // 3, most // 2, most} - {0}:
        choices, is_exact = best_plan(places, needed)
        saved, harm = totals([places[place][number] for place, number in choices])
        assert is_exact
        assert saved >= needed
        assert harm == pytest.approx(min(harm for saved, harm in map(totals, plans) if saved >= needed), rel=1e-12)


@pytest.mark.parametrize(
    "harm_of",
    [
        lambda share, draw: share**2 * draw.uniform(0.8, 1.2),
        lambda share, draw: share * draw.uniform(0.9999, 1.0001),
        lambda share, draw: share,
        lambda share, draw: share**3,
    ],
    ids=["noisy square", "almost in proportion", "in proportion", "cube"],
)
def test_large_problems_are_solved_within_the_tolerance_in_bounded_work(harm_of, monkeypatch):
    places = large_problem(2, harm_of)
    needed = UNITS * 4 // 10
    alive = []
    add = Front.add

    def counted(front, *arguments, **settings):
        add(front, *arguments, **settings)
        alive.append(len(front.saved))

    monkeypatch.setattr(Front, "add", counted)
    choices, _ = best_plan(places, needed)
    chosen = [
        next(option for option in places[place] if option.choices[1] == share) for place, share in pairs(choices)
    ]
    saved, harm = totals(chosen)
    assert saved >= needed
    assert harm <= (1 + TOLERANCE) * Bound(places, needed).least
    assert sum(alive) < 4_000_000  # plans in all; the exact front has more at a single place


def pairs(choices):
    return zip(choices[::2], choices[1::2], strict=True)


def test_a_front_with_equal_plans_merged_stays_within_its_tolerance(monkeypatch):
    places = large_problem(3, lambda share, draw: share**2 * draw.uniform(0.5, 2))[:12]
    exact = front_of(places)
    assert exact.is_exact
    monkeypatch.setattr(knapsack, "LARGEST_FRONT", 50)
    merged = front_of(places, tolerance=0.1)
    assert not merged.is_exact
    assert len(merged.harm) < len(exact.harm)
    for saved, harm in zip(exact.saved.tolist(), exact.harm.tolist(), strict=True):
        assert merged.harm[merged.saved >= saved].min().item() <= 1.1 * harm + 1e-15


def test_plans_that_save_the_same_are_one():
    front = front_of([[Option(5, 2.0, ("a",)), Option(5, 1.0, ("b",)), Option(3, 1.5, ("c",))]])
    assert (front.saved.tolist(), front.harm.tolist()) == ([5, 0], [1.0, 0.0])
    assert front.choices_of(0) == ("b",)
