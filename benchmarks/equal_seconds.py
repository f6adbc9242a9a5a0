"""Recipes run at equal seconds: what a step of each stage costs is measured in turns, and steps are what seconds buy.

Seconds of a busy machine say little, so a price is a ratio to today's stage two, measured in turns on the clock of the
process, and a row holds the steps that were bought. Rows are written as they come; a run that is started again goes on
behind the last.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from tqdm.auto import tqdm

from diffusers_graft.errors import FileError, GraftError
from diffusers_graft.evaluation.evaluate import evaluate
from diffusers_graft.evaluation.timing import Timing, compare, require_rounds
from diffusers_graft.injection.graft import Graft, build_graft
from diffusers_graft.injection.install import install, uninstall
from diffusers_graft.operators import OperatorConfig, parse_operator
from diffusers_graft.planning.plan import plan_graft
from diffusers_graft.training.distill.config import ClosedFormConfig, DistillConfig
from diffusers_graft.training.distill.distill import distill
from diffusers_graft.training.distill.ridge import closed_form
from diffusers_graft.training.finetune.config import FinetuneConfig
from diffusers_graft.training.finetune.finetune import finetune

from .recipes_tried import ALL, TODAY, TODAY_ONE, TODAY_STEPS, TODAY_TWO, Recipe
from .rows import read_rows, require_same_weights, weights_of, write_row
from .subjects import Letters, Quality, Subject

SOLVING = "closed form"
ONE = "stage one"
TWO = "stage two"
LOOKING = "held out"

# Settings that change no price.
_FREE = {
    *("steps", "lr", "lr_scale", "warmup", "schedule", "schedule_args", "seed", "timesteps", "progress"),
    *("ema_decay", "min_snr", "denoising"),
}
# Steps beyond every warm-up, for settings that are compared.
_MANY = 100_000
# Seeds of the streams that a run sees, beside the seed of the run: nothing is held out that is trained on.
_STREAMS = {ONE: 100, TWO: 200, LOOKING: 400}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How recipes are run and measured.

    Attributes:
        quality: of the measures; None is the subject's.
        probe, rounds: steps of a run that is priced (None: the subject's), and how often it is measured.
        unit: steps of today's stages; what they cost is the unit of `times`.
        controls: run the original through the same stage two, too.
    """

    quality: Quality | None = None
    probe: int | None = None
    rounds: int = 3
    unit: tuple[int, int] = TODAY_STEPS
    controls: bool = True

    def __post_init__(self):
        require_rounds(self.rounds)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run: a recipe, a multiple of today's seconds, and a seed."""

    recipe: Recipe
    times: float
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        """What the row of the run is found by."""
        return {"recipe": self.recipe.name, "times": round(self.times, 4), "seed": self.seed}


class Trial:
    """All runs of recipes on one subject, and the file of their rows.

    Attributes:
        quality: how models are measured.
        head: the first row: what is the same for all, and the original's measures.
        seconds: prices, by what they are of.
        latency: rows of forwards that were timed, by name.
        rows: of the runs and of controls.

    Raises `GraftError` where the rows there are of another model or measured in another way.
    """

    def __init__(self, subject: Subject, path: Path, protocol: Protocol | None = None):
        self.subject = subject
        self.protocol = protocol or Protocol()
        self.quality = self.protocol.quality or subject.quality
        self.path = path
        stored = read_rows(path)
        facts = self._facts()
        if stored and not _agrees(stored[0], facts):
            raise GraftError(f"{path} holds rows of another ablation: {stored[0]}. Give another --output.")
        if not stored:
            path.parent.mkdir(parents=True, exist_ok=True)
            model = subject.load()
            head = {**facts, "weights": weights_of(model), "torch": torch.__version__}
            stored = [write_row(path, {**head, "original": self._measure(model)})]
        self.head, *others = stored
        self.seconds: dict[str, float] = {row["price"]: row["seconds"] for row in others if "price" in row}
        self.latency: dict[str, dict[str, Any]] = {row["latency"]: row for row in others if "latency" in row}
        self.rows = [row for row in others if "scores" in row]

    @classmethod
    def read(cls, path: Path) -> Trial:
        """Return the runs of a file, of whatever model and protocol they are. Raises `FileError` without a file."""
        rows = read_rows(path)
        if not rows:
            raise FileError(f"{path} holds no rows to report on. Run something first.")
        quality = Quality(**rows[0]["quality"])
        protocol = Protocol(quality=quality, unit=tuple(rows[0]["unit"]))
        return cls(Letters(rows[0]["subject"]), path, protocol)

    def _facts(self) -> dict[str, Any]:
        facts = {
            "subject": self.subject.name,
            "quality": asdict(self.quality),
            "unit": self.protocol.unit,
            "today": {ONE: make_distill(TODAY, _MANY).to_dict(), TWO: make_finetune(TODAY, _MANY).to_dict()},
        }
        return json.loads(json.dumps(facts))

    def run(self, arms: Sequence[Arm], *, say: Callable[[str], None], progress: bool = True) -> None:
        """Run the arms that have no row yet, in their order, each followed by its control.

        Raises `GraftError`, before anything runs, for a recipe whose rows are of other settings, and for rows of a
        model with other weights.
        """
        require_same_weights(self.path, self.head, self.subject.load())
        for arm in arms:
            self._require_same_settings(arm)
        self.measure_prices([arm.recipe for arm in arms], say)
        with tqdm(arms, unit="run", disable=None if progress else True) as bar:
            for arm in bar:
                bar.set_description(f"{arm.recipe.name} x {arm.times:.2g}, seed {arm.seed}")
                row = self.find(arm.identity) or self._add(self._run(arm))
                control = row["control"]
                if self.protocol.controls and control is not None and self.find(control) is None:
                    self._add(self._run_control(arm, control))

    def find(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row of a run or of a control, None where it has not run."""
        identity = json.loads(json.dumps(identity))
        for row in self.rows:
            if all(row.get(name) == value for name, value in identity.items()):
                return row
        return None

    def control_of(self, arm: Arm, steps: Sequence[int]) -> dict[str, Any] | None:
        """Return what the control of an arm is found by; None where stage two trains nothing of the original."""
        recipe = arm.recipe
        count = sum(steps[1::2])
        settings = settings_of(recipe)["two"]
        if not count or settings.get("train") == "operators":
            return None
        batches = {"batch_size": recipe.batch_size, "held_out": recipe.held_out}
        return {"original_after": settings, "steps": count, "seed": arm.seed, **batches}

    def measure_prices(self, recipes: Iterable[Recipe], say: Callable[[str], None]) -> None:
        """Measure what is not priced yet, in turns with today's stage two."""
        reference = name_price(TODAY, TWO)
        parts: dict[str, Callable[[], Any]] = {}
        for recipe in (TODAY, *recipes):
            for part in parts_of(recipe):
                name = name_price(recipe, part)
                if name not in self.seconds and name not in parts:
                    parts[name] = self._make_probe(recipe, part)
        if not parts:
            return
        say(f"Measuring what {len(parts)} parts of recipes cost, each in turns with today's stage two.")
        yardstick = self._make_probe(TODAY, TWO)
        probe = self.protocol.probe or self.subject.probe
        # The time of this process alone, and pairs by themselves: a busy machine changes from minute to minute.
        settings: dict[str, Any] = {"rounds": self.protocol.rounds, "clock": time.process_time}
        if parts.pop(reference, None):
            (alone,) = compare({reference: yardstick}, **settings)
            self._add_price(reference, alone.seconds / probe, alone)
        for name, run in parts.items():
            _, timing = compare({reference: yardstick, name: run}, **settings)
            # Stages are priced by the step, the others whole.
            steps = probe if name.startswith("stage") else 1
            self._add_price(name, timing.ratio * self.seconds[reference] * probe / steps, timing)

    def _add_price(self, name: str, seconds: float, timing: Timing) -> None:
        spread = {"ratio": timing.ratio, "low": timing.low, "high": timing.high}
        write_row(self.path, {"price": name, "seconds": seconds, **spread})
        self.seconds[name] = seconds

    def price(self, recipe: Recipe, part: str) -> float:
        """Return the seconds of a step of a recipe's stage, or of a whole closed form or look at held-out batches."""
        return self.seconds[name_price(recipe, part)]

    @property
    def unit_seconds(self) -> float:
        """The seconds that today's recipe costs."""
        one, two = self.protocol.unit
        return one * self.price(TODAY, ONE) + two * self.price(TODAY, TWO)

    def steps_of(self, arm: Arm) -> list[int]:
        """Return the steps that the arm's seconds buy, of stage one and stage two by turns.

        None of either where a closed form alone costs as much.
        """
        recipe = arm.recipe
        left = arm.times * self.unit_seconds
        if recipe.closed_form:
            left = max(0.0, left - self.price(recipe, SOLVING))
        shares = recipe.shares
        if shares is None:
            first = self.protocol.unit[0] * self.price(TODAY, ONE) / self.unit_seconds
            shares = (first, 1 - first)
        steps = []
        for stage, share in zip((ONE, TWO) * len(shares), shares, strict=False):
            step = self.price(recipe, stage) if share else 1.0
            seconds = share * left
            if share and stage == TWO and recipe.held_out:
                # It looks before the first step, and every so many behind that.
                look = self.price(recipe, LOOKING)
                seconds = max(0.0, seconds - look)
                step += look / make_finetune(recipe, 1).evaluate_every
            steps.append(round(seconds / step))
        return steps

    def _make_probe(self, recipe: Recipe, part: str) -> Callable[[], Any]:
        """Return a short run of a part of a recipe, to be timed; it hardly changes its model."""
        model, graft = self._start(recipe, 0)
        noise = {"noise_scheduler": self.subject.scheduler}
        stream = partial(self.subject.batches, recipe.batch_size, 0)
        steps = self.protocol.probe or self.subject.probe
        if part == SOLVING:
            solved = ClosedFormConfig(steps=recipe.closed_form, progress=False)
            return lambda: closed_form(model, graft, stream(steps=recipe.closed_form), solved, **noise)
        if part == ONE:
            one = dataclasses.replace(make_distill(recipe, steps), lr=1e-9)
            return lambda: distill(model, graft, stream(), one, **noise)
        if part == LOOKING:
            batches = list(stream(steps=make_finetune(recipe, 1).held_out_batches))
            return lambda: evaluate(model, batches, **noise)
        two = dataclasses.replace(make_finetune(recipe, steps), lr=1e-9)

        def settle() -> None:
            install(model, graft)
            finetune(model, stream(), two, **noise)
            uninstall(model)

        return settle

    def _start(self, recipe: Recipe, seed: int) -> tuple[ModelMixin, Graft]:
        model = self.subject.load()
        config: OperatorConfig = parse_operator(recipe.operator)
        config = dataclasses.replace(config, init=recipe.init)
        return model, build_graft(model, plan_graft(model, {recipe.sites: config}), seed=1000 * seed)

    def _run(self, arm: Arm) -> dict[str, Any]:
        recipe = arm.recipe
        steps = self.steps_of(arm)
        model, graft = self._start(recipe, arm.seed)
        noise = {"noise_scheduler": self.subject.scheduler}
        lessons = self.subject.batches(recipe.batch_size, _STREAMS[ONE] + arm.seed)
        # Drawn anew, so that recipes and controls see the same batches in stage two.
        stream = self.subject.batches(recipe.batch_size, _STREAMS[TWO] + arm.seed)
        started = time.process_time()
        if recipe.closed_form:
            closed_form(model, graft, lessons, ClosedFormConfig(steps=recipe.closed_form, progress=False), **noise)
        for stage, count in zip((ONE, TWO) * len(steps), steps, strict=False):
            if count and stage == ONE:
                distill(model, graft, lessons, make_distill(recipe, count, arm.seed), **noise)
            elif count:
                install(model, graft)
                self._finetune(model, recipe, stream, count, arm.seed)
                uninstall(model)
        elapsed = time.process_time() - started
        install(model, graft)
        return {
            **arm.identity,
            "settings": settings_of(recipe),
            "steps": steps,
            "core_seconds": round(elapsed, 1),
            "control": self.control_of(arm, steps),
            "scores": self._measure(model),
        }

    def _run_control(self, arm: Arm, control: dict[str, Any]) -> dict[str, Any]:
        """Run the original through an arm's stage two."""
        model = self.subject.load()
        # Softmax in the place of softmax, since stage two is of a model with a graft.
        install(model, build_graft(model, plan_graft(model, {ALL: "self_attention"}), seed=arm.seed))
        stream = self.subject.batches(arm.recipe.batch_size, _STREAMS[TWO] + arm.seed)
        self._finetune(model, arm.recipe, stream, control["steps"], arm.seed)
        return {**control, "scores": self._measure(model)}

    def _finetune(self, model: ModelMixin, recipe: Recipe, stream: Any, steps: int, seed: int) -> None:
        config = make_finetune(recipe, steps, seed)
        held_out = None
        if recipe.held_out:
            seed = _STREAMS[LOOKING] + seed
            held_out = list(self.subject.batches(recipe.batch_size, seed, steps=config.held_out_batches))
        finetune(model, stream, config, noise_scheduler=self.subject.scheduler, held_out=held_out)

    def _measure(self, model: ModelMixin) -> dict[str, float]:
        return self.subject.measure(model, self.quality)

    def _add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(write_row(self.path, row))
        return row

    def _require_same_settings(self, arm: Arm) -> None:
        """Raise `GraftError` where rows of this name are of other settings."""
        row = self.find({"recipe": arm.recipe.name})
        settings = settings_of(arm.recipe)
        if row is not None and row["settings"] != settings:
            raise GraftError(
                f"The rows of {arm.recipe.name!r} in {self.path} are of {row['settings']}, and the recipe is now "
                f"{settings}. Give it another name, or delete those rows."
            )


def parts_of(recipe: Recipe) -> list[str]:
    """Return the parts of a recipe that have a price."""
    shares = (1, 1) if recipe.shares is None else recipe.shares
    parts = {
        SOLVING: recipe.closed_form > 0,
        ONE: any(shares[0::2]),
        TWO: any(shares[1::2]),
        LOOKING: recipe.held_out,
    }
    return [name for name, is_there in parts.items() if is_there]


def name_price(recipe: Recipe, part: str) -> str:
    """Return what a price is of: the part, and the settings that it depends on."""
    words = [f"{recipe.operator} at {recipe.sites}", f"batches of {recipe.batch_size}"]
    if part == SOLVING:
        words.append(f"{recipe.closed_form} of them")
    elif part != LOOKING:
        differences = settings_of(recipe)["one" if part == ONE else "two"]
        words += [f"{name} {value}" for name, value in differences.items() if name not in _FREE]
    return f"{part}: {', '.join(words)}"


def make_distill(recipe: Recipe, steps: int, seed: int = 0) -> DistillConfig:
    """Return a recipe's settings of stage one."""
    return _make_config(DistillConfig, {} if recipe.defaults else TODAY_ONE, recipe.one, steps, seed)


def make_finetune(recipe: Recipe, steps: int, seed: int = 0) -> FinetuneConfig:
    """Return a recipe's settings of stage two."""
    return _make_config(FinetuneConfig, {} if recipe.defaults else TODAY_TWO, recipe.two, steps, seed)


def _make_config(kind: type, base: dict[str, Any], changes: Any, steps: int, seed: int) -> Any:
    config = kind(**{**base, **changes, "steps": steps, "seed": seed, "progress": False})
    # A warm-up of most of a short run would be no run of that rate.
    return dataclasses.replace(config, warmup=min(config.warmup, steps // 10))


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return what differs from today's recipe, the library's defaults written out, JSON-able."""
    one = _find_differences(make_distill(recipe, _MANY), make_distill(TODAY, _MANY))
    two = _find_differences(make_finetune(recipe, _MANY), make_finetune(TODAY, _MANY))
    return {**recipe.difference, "one": one, "two": two}


def _agrees(stored: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Return whether rows are of these facts; settings that came later are no disagreement."""
    today = facts["today"]
    is_same = all(stored.get(name) == facts[name] for name in facts.keys() - {"today"})
    for stage, settings in stored.get("today", {}).items():
        is_same = is_same and {**today[stage], **settings} == today[stage]
    return is_same


def _find_differences(config: Any, other: Any) -> dict[str, Any]:
    before = other.to_dict()
    return {name: value for name, value in config.to_dict().items() if value != before[name]}
