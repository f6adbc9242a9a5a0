"""Recipes that `python -m benchmarks ablate` runs at equal seconds: what differs from today's, one entry a recipe.

A new one is a new entry of `RECIPES`; its name stands in the rows, so a recipe that is changed gets a new name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers_graft.errors import GraftError, UnknownNameError

HALF = "self_attention[1::2]"
# The half whose replacement by 3 x 3 neighbourhoods moves the answer least of all 70, each measured by itself;
# `dg.survey` names 3, 4, 6 and 7.
LEAST_HARM = "self_attention[0,3,4,6]"
ALL = "self_attention[:]"
HYBRID = "hybrid(first='neighborhood')"
# 3 x 3 neighbours and the means of all 2 x 2 tiles: 25 keys of the letters' 64.
FAR = "neighborhood(far=2)"
# Softmax over the quarter of all 2 x 2 tiles that matters most to a query's tile, linear attention over the rest.
SPARSE = "sparse_linear(block=2, keep=0.25)"
HEDGEHOG = "linear_attention(feature_map='softmax')"
MERGED = "linear_attention(feature_map='softmax', heads=2)"

# The quick start's settings when this table was begun, in full: changed defaults of the library change no row of it.
_BOTH: dict[str, Any] = {
    "schedule_args": {},
    "optimizer_args": {},
    "accumulate": 1,
    "timesteps": "auto",
    "prompt_dropout": 0.1,
    "evaluate_every": 100,
    "held_out_batches": 4,
    "lr_scale": {},
}
TODAY_ONE: dict[str, Any] = {
    "loss": "auto",
    "lr": 2e-3,
    "warmup": 20,
    "schedule": "cosine",
    "optimizer": "AdamW",
    "weight_decay": 0.0,
    "max_grad_norm": 10.0,
    "gated": False,
    "mode": "parallel",
    "reuse": 1,
    "closed_form": None,
    "patience": None,
    **_BOTH,
}
TODAY_TWO: dict[str, Any] = {
    "lr": 5e-4,
    "warmup": 20,
    "schedule": "constant_with_warmup",
    "optimizer": "AdamW",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "train": "all",
    "ema_decay": 0.98,
    "min_snr": None,
    "denoising": 1.0,
    "distill_output": 0.0,
    "distill_features": 0.0,
    "trajectory": 0,
    "progressive": None,
    **_BOTH,
}
# Steps of stage one and of stage two: what they cost is the unit of `times`.
TODAY_STEPS = (500, 250)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way from a pretrained model to a grafted one.

    Attributes:
        operator, sites: what takes the place of which sites.
        init: of new parts, `warm` or `random`.
        closed_form: batches that a closed form sees before stage one; 0 is none.
        one, two: settings of `DistillConfig` and of `FinetuneConfig` that differ from today's.
        shares: of the seconds that the closed form leaves, to stage one and stage two by turns: `(0, 1)` has stage two
            alone, `(0.4, 0.3, 0.1, 0.2)` distils once more after stage two. None divides them as today.
        held_out: stage two keeps the weights that are best on batches it never trains on.
        batch_size: of both stages.
        times: multiples of today's seconds that the recipe is run with, unless others are asked for.
        defaults: start from the library's defaults instead of today's settings.
    """

    name: str
    operator: str = "neighborhood"
    sites: str = HALF
    init: str = "warm"
    closed_form: int = 0
    one: Mapping[str, Any] = field(default_factory=dict)
    two: Mapping[str, Any] = field(default_factory=dict)
    shares: tuple[float, ...] | None = None
    held_out: bool = False
    batch_size: int = 32
    times: tuple[float, ...] = (1,)
    defaults: bool = False

    def __post_init__(self):
        if self.shares is not None and (min(self.shares) < 0 or not 0 <= sum(self.shares) <= 1 + 1e-9):
            raise GraftError(
                f"Shares of the seconds are not negative and make 1 at most; {self.name} has {self.shares}."
            )

    @property
    def difference(self) -> dict[str, Any]:
        """What differs from today's recipe beside the settings of both stages, JSON-able."""
        found = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name not in ("name", "times", "one", "two") and value != entry.default:
                found[entry.name] = value
        return json.loads(json.dumps(found, default=str))

    def but(self, name: str, **changes: Any) -> Recipe:
        """Return the recipe under another name; settings of `one` and `two` are added to those it has."""
        for stage in ("one", "two"):
            changes[stage] = {**getattr(self, stage), **changes.get(stage, {})}
        return dataclasses.replace(self, name=name, **changes)


TODAY = Recipe(name="today", times=(1, 2))
COSINE = TODAY.but("cosine", two={"schedule": "cosine"})
TEACHER = COSINE.but("teacher 4", two={"lr": 3e-4, "distill_output": 4.0})
SOLVED = TODAY.but("closed form", closed_form=8)
ALONE = SOLVED.but("closed form, stage two", shares=(0, 1), two={"schedule": "cosine", "lr": 1e-3})
# The ungrafted model alone teaches: its answer, and the output of every block.
BLOCKS = ALONE.but("blocks", two={"denoising": 0.0, "distill_output": 1.0, "distill_features": 5.0, "ema_decay": 0.0})
MUON = BLOCKS.but("blocks, Muon", two={"optimizer": "Muon", "lr": 3e-3})
EVEN = MUON.but("blocks, Muon, uniform noise", two={"timesteps": "uniform"})
PAPER = TODAY.but("paper", operator="hyena_x", init="random", times=(1,))

RECIPES = (
    TODAY,
    TODAY.but("default", defaults=True, closed_form=8, shares=(0, 1), times=(1 / 30, 1 / 10, 1, 2)),
    # rates and decay of stage two
    COSINE,
    COSINE.but("cosine, 1e-4", two={"lr": 1e-4}),
    COSINE.but("cosine, 2e-4", two={"lr": 2e-4}),
    COSINE.but("cosine, 1e-3", two={"lr": 1e-3}),
    TODAY.but("average .99", two={"ema_decay": 0.99}),
    # the teacher in stage two
    COSINE.but("teacher 1", two={"distill_output": 1.0}),
    TEACHER,
    COSINE.but("teacher 4, 5e-4", two={"distill_output": 4.0}),
    COSINE.but("teacher 4, 1e-3", two={"distill_output": 4.0, "lr": 1e-3}),
    COSINE.but("features", two={"lr": 3e-4, "distill_features": 1.0}),
    TEACHER.but("teacher 4, features", two={"distill_features": 1.0}),
    COSINE.but("teacher alone", two={"denoising": 0.0, "distill_output": 1.0}),
    COSINE.but("teacher and features alone", two={"denoising": 0.0, "distill_output": 1.0, "distill_features": 1.0}),
    TEACHER.but("teacher 4, average auto", two={"ema_decay": "auto"}),
    COSINE.but(
        "teacher on its own trajectory", two={"denoising": 0.0, "distill_output": 1.0, "trajectory": 4, "lr": 3e-4}
    ),
    TEACHER.but("progressive", two={"progressive": "forward"}),
    TEACHER.but("progressive, least harm", two={"progressive": "least_harm"}),
    # optimisers
    COSINE.but("Muon", one={"optimizer": "Muon"}, two={"optimizer": "Muon"}),
    TEACHER.but("teacher 4, Muon", one={"optimizer": "Muon"}, two={"optimizer": "Muon"}),
    TEACHER.but("teacher 4, rates by kind", two={"lr_scale": {HALF: 3.0, "rest": 0.5}}),
    # noise levels, and which parameters train
    COSINE.but("min-SNR", two={"min_snr": 5.0}),
    COSINE.but("operators alone", two={"train": "operators", "lr": 2e-3}),
    COSINE.but("held out", held_out=True),
    COSINE.but("batches of 64", batch_size=64),
    COSINE.but("batches of 16", batch_size=16),
    # stage one, and how much of the seconds it gets
    SOLVED,
    ALONE,
    ALONE.but("closed form, teacher 1", two={"distill_output": 1.0}),
    ALONE.but("closed form, teacher 4", two={"distill_output": 4.0}),
    ALONE.but("closed form, teacher 4, 5e-4", two={"distill_output": 4.0, "lr": 5e-4}, times=(1, 2)),
    SOLVED.but("closed form, a fifth for stage one", shares=(0.2, 0.8), two=ALONE.two),
    TODAY.but("sequential", one={"mode": "sequential"}),
    TODAY.but("correcting", one={"mode": "correcting"}),
    TODAY.but("relative L2", one={"loss": "relative_l2"}),
    TODAY.but("reuse 4", one={"reuse": 4}),
    TODAY.but("gated", one={"gated": True}),
    TEACHER.but("distilled again", closed_form=8, shares=(0.2, 0.4, 0.1, 0.3)),
    # a closed form, then stage two by the ungrafted model alone
    BLOCKS.but("closed form, teacher alone", two={"distill_features": 0.0}),
    BLOCKS,
    MUON.but("blocks, Muon", times=(1, 2)),
    TODAY.but("least harm: today", sites=LEAST_HARM),
    MUON.but("least harm: blocks, Muon", sites=LEAST_HARM, times=(1, 2)),
    EVEN,
    EVEN.but("least harm: blocks, Muon, uniform noise", sites=LEAST_HARM, times=(1, 2)),
    EVEN.but("far neighborhood, blocks, Muon, uniform noise", operator=FAR, times=(1, 2)),
    EVEN.but("sparse linear, blocks, Muon, uniform noise", operator=SPARSE, times=(1, 2)),
    MUON.but("blocks, Muon, batches of 16", batch_size=16),
    MUON.but("blocks, Muon, progressive", two={"progressive": "least_harm"}),
    MUON.but("blocks, Muon, progressive, until settled", two={"progressive": "least_harm", "progressive_patience": 5}),
    MUON.but("blocks, Muon, own trajectory", two={"trajectory": 4}),
    MUON.but("blocks, Muon, distributions", two={"trajectory": 4, "match_distribution": 1.0}),
    MUON.but("blocks, Muon, a fifth for stage one", shares=(0.2, 0.8)),
    MUON.but("blocks, Muon, a fifth correcting", one={"mode": "correcting"}, shares=(0.2, 0.8)),
    MUON.but("blocks, Muon, data too", two={"denoising": 1.0}),
    MUON.but("blocks, Muon, average", two={"ema_decay": "auto"}),
    # features that imitate softmax's weights (Hedgehog), fitted by stage one or by the whole model
    EVEN.but("Hedgehog", operator=HEDGEHOG, times=(0.5,)),
    EVEN.but("Hedgehog, a fifth for stage one", operator=HEDGEHOG, shares=(0.2, 0.8), times=(0.5,)),
    EVEN.but("Hedgehog, heads merged in pairs", operator=MERGED, times=(0.5,)),
    # all attention
    EVEN.but("all: blocks, Muon, uniform noise", sites=ALL, times=(1, 4)),
    EVEN.but("all: far neighborhood, blocks, Muon, uniform noise", sites=ALL, operator=FAR, times=(1, 4)),
    EVEN.but("all: sparse linear, blocks, Muon, uniform noise", sites=ALL, operator=SPARSE, times=(1, 4)),
    EVEN.but("all: hybrid, blocks, Muon, uniform noise", sites=ALL, operator=HYBRID, times=(1, 4)),
    TODAY.but("all: today", sites=ALL, times=(1, 4)),
    TEACHER.but("all: teacher 4", sites=ALL, closed_form=8, times=(1, 4)),
    # the paper's recipe, which ours is to match at a tenth and at a thirtieth of its seconds
    PAPER,
)

# What the first ablation asked: each start with each training, at a ninth of today's seconds.
STARTS = {
    "random": TODAY.but("random", init="random", times=(1 / 9,)),
    "warm": TODAY.but("warm", times=(1 / 9,)),
    "closed form": SOLVED.but("closed form", times=(1 / 9,)),
}
TRAININGS = {"none": (0, 0), "stage one": (1, 0), "stage two": (0, 1), "both": (0.5, 0.5)}
FIRST = tuple(
    start.but(f"{name} start, {training}", shares=shares)
    for name, start in STARTS.items()
    for training, shares in TRAININGS.items()
)


def choose_recipes(names: Iterable[str] | None = None) -> list[Recipe]:
    """Return the recipes of these names, or all. Raises `UnknownNameError` for another name."""
    available = {recipe.name: recipe for recipe in (*RECIPES, *FIRST)}
    chosen = list(available if names is None else names)
    for name in chosen:
        if name not in available:
            raise UnknownNameError("recipe", name, available)
    return [available[name] for name in chosen]
