"""A recipe from its model to a shared graft, stage by stage; what is done already is not done again."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from filelock import FileLock, Timeout

from ..data.collation import BatchMaker
from ..errors import FileError, StateError, TrainingError, UnknownNameError
from ..evaluation import metrics as metric_classes
from ..evaluation.analysis import Analysis
from ..evaluation.analyze import analyze
from ..evaluation.benchmark import benchmark
from ..evaluation.evaluate import evaluate
from ..evaluation.metrics.base import SampleMetric
from ..evaluation.sampling import Sampling
from ..evaluation.scores import Scores, load_scores
from ..injection.graft import get_graft
from ..injection.install import uninstall
from ..planning.plan import GraftPlan, plan_graft
from ..planning.rules import low_local, top_local
from ..reporting.report import try_report
from ..samples import SampleConfig, Samples
from ..search.survey import plan_candidates, survey
from ..serialization.upload import push_graft
from ..testbed.sampling import SampleQuality
from ..testbed.scenes import SceneScore
from ..trainer import GraftTrainer, GraftTrainingArguments
from ..training.batches import Batch
from ..training.distributed import is_main_process, process_state, wait_for_all
from .data import Data, list_conditions, make_data, require_data
from .reading import RECIPE, load_recipe, save_recipe
from .schema import EvaluateSettings, Recipe
from .sources import Source, load_source, require_dtype

logger = logging.getLogger(__name__)

PLAN = "plan.json"
SCORES = "scores.json"
BENCHMARK = "benchmark.json"
SURVEY = "survey.json"
ANALYSIS = "analysis.json"
# Stays in the folder: deleting it would let two runs hold two files of one name.
_LOCK = ".lock"

STAGES = ("plan", "distill", "finetune", "evaluate", "benchmark", "report", "share")
# Metrics of the testbeds judge their own pictures; the others need a pipeline.
TESTBED_METRICS: dict[str, type] = {"SampleQuality": SampleQuality, "SceneScore": SceneScore}

# Keys of rules that the locality of the model decides.
_LOCAL = re.compile(r"(\w+)\[(most|least) local ([\d.]+)%\]")

# Keys that may change from one start of a run to the next: what they decide comes after the training.
_CHANGEABLE = ("evaluate", "benchmark", "report", "samples", "share", "output")

Say = Callable[[str], None]


@dataclass
class Run:
    """A recipe that is under way.

    Attributes:
        recipe: of the run.
        source: its model.
        data: its data.
        trainer: of both stages.
        scores: measured so far, by the state of the model.
        say: receives each line of the report.
    """

    recipe: Recipe
    source: Source
    data: Data
    trainer: GraftTrainer
    scores: dict[str, Scores] = field(default_factory=dict)
    say: Say = lambda text: None

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.recipe.output)


def run_recipe(recipe: Recipe, *, last: str = "share", say: Say = lambda text: None) -> Path:
    """Run a recipe, or go on where an earlier run of it was stopped.

    Args:
        last: the last of the `STAGES` to run.
        say: receives each line of the report.

    Returns the output folder.

    Raises:
        StateError: the output folder is in use, or holds a run of another recipe.
        FileError: a model, data, or a folder that is not there.
        GraftError: settings that do not fit each other, the model or the device; before anything is trained.
    """
    if last not in STAGES:
        raise UnknownNameError("stage", last, STAGES)
    wanted = STAGES[: STAGES.index(last) + 1]
    if not is_main_process():
        say = _say_nothing
    require_ready(recipe)
    # Before anything is loaded, since a second run would wait minutes to be refused.
    with _claim_folder(Path(recipe.output)):
        run = _start(recipe, say)
        if "distill" in wanted:
            _train(run, wanted)
        if "benchmark" in wanted and recipe.benchmark is not None:
            _benchmark(run)
        if "report" in wanted and recipe.report and is_main_process():
            try_report(run.folder)
        if "share" in wanted and recipe.share is not None:
            _share(run)
    return run.folder


def analyze_recipe(recipe: Recipe) -> Analysis:
    """Measure locality, activations and redundancy of a recipe's model on its held-out data, into `analysis.json`.

    Raises what `run_recipe` does before it trains, and what `dg.analyze` does.
    """
    require_ready(recipe)
    folder = Path(recipe.output)
    with _claim_folder(folder):
        source = load_source(recipe.model)
        return _analyze(recipe, source, make_data(recipe, source))


def _analyze(recipe: Recipe, source: Source, data: Data) -> Analysis:
    """Analyze a model on the held-out data, unless that was done."""
    path = Path(recipe.output) / ANALYSIS
    if path.exists():
        return Analysis.load(path)
    analysis = analyze(source.model, data.held_out, noise_scheduler=source.noise_scheduler, seed=recipe.seed)
    if is_main_process():
        analysis.save(path)
    return analysis


def choose_local(rules: Mapping[str, Any], locality: Mapping[str, float]) -> dict[str, Any]:
    """Return rules whose keys `self_attention[most local 50%]` and `[least local 50%]` name the sites they mean.

    Args:
        locality: share of attention mass near the query, by the address of a site.
    """
    chosen: dict[str, Any] = {}
    for key, operator in rules.items():
        match = _LOCAL.fullmatch(key)
        if match is not None:
            kind, end, share = match.groups()
            choose = top_local if end == "most" else low_local
            key = choose(locality, float(share) / 100, kind=kind)
        chosen[key] = operator
    return chosen


def _say_nothing(text: str) -> None:
    """Leave the report to the first process."""


def require_ready(recipe: Recipe) -> None:
    """Raise an error for what cannot run, before anything is downloaded or trained."""
    require_data(recipe)
    require_dtype(recipe.model)
    if recipe.evaluate is not None:
        metrics = make_metrics(recipe.evaluate)
        if any(isinstance(metric, SampleMetric) for metric in metrics):
            list_evaluated(recipe.evaluate)
    folder = Path(recipe.output)
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file, and the output is a folder. Give another output.")
    if (folder / RECIPE).exists():
        _require_same(recipe, load_recipe(folder / RECIPE), folder)


def _require_same(recipe: Recipe, there: Recipe, folder: Path) -> None:
    """Raise `StateError` where a folder holds a run whose training another recipe decided."""
    for one in dataclasses.fields(Recipe):
        if one.name in _CHANGEABLE:
            continue
        wanted = getattr(recipe, one.name)
        found = getattr(there, one.name)
        if wanted != found:
            key, was, now = _find_difference(one.name, found, wanted)
            raise StateError(
                f"{folder} holds a run with {key} {was!r}, and this recipe has {now!r}. Give another output, or "
                "delete that folder."
            )


def _find_difference(name: str, there: Any, wanted: Any) -> tuple[str, Any, Any]:
    """Return the innermost key that differs, with both values."""
    if dataclasses.is_dataclass(there) and type(there) is type(wanted):
        for one in dataclasses.fields(there):
            values = getattr(there, one.name), getattr(wanted, one.name)
            if values[0] != values[1]:
                return _find_difference(f"{name}.{one.name}", *values)
    return name, there, wanted


@contextlib.contextmanager
def _claim_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder inside; the system forgets the claim of a process that was killed.

    Raises `StateError` where another run has it, and `FileError` where it cannot be written.
    """
    # The processes of one launch share a folder, and the first of them speaks for all.
    if not is_main_process():
        yield
        return
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StateError(f"{folder} is in use by another run. Wait for it, or give another output.") from error
    except OSError as error:
        raise FileError(f"{folder} cannot be written ({error}). Give another output.") from error
    try:
        yield
    finally:
        lock.release()


def _start(recipe: Recipe, say: Say) -> Run:
    """Load the model, choose the plan, open the data."""
    folder = Path(recipe.output)
    source = load_source(recipe.model)
    plan = None
    needs_analysis = isinstance(recipe.plan, Mapping) and any(map(_LOCAL.fullmatch, recipe.plan))
    if recipe.plan is not None and not needs_analysis:
        # Before data are drawn: rules may not fit the model.
        plan = resolve_plan(source.model, recipe.plan)
    if recipe.search is not None:
        plan_candidates(source.model, recipe.search.candidates)
    if is_main_process():
        save_recipe(recipe, folder)
    say(f"{type(source.model).__name__} of {recipe.model.name}")
    data = make_data(recipe, source)
    # A search judges candidates on the data, so it comes after them.
    if needs_analysis:
        assert isinstance(recipe.plan, Mapping)
        analysis = _analyze(recipe, source, data)
        plan = resolve_plan(source.model, choose_local(recipe.plan, analysis.locality))
    if plan is None:
        plan = _search(recipe, source, data, folder)
    if is_main_process():
        plan.save(folder / PLAN)
    say(f"{plan}\n")
    trainer = GraftTrainer(
        source.model,
        plan,
        _training_arguments(recipe),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        noise_scheduler=source.noise_scheduler,
        null_prompt=data.null_prompt,
        data_collator=data.collate,
        previews=_make_previews(recipe, source),
    )
    scores = load_scores(folder / SCORES) if (folder / SCORES).exists() else {}
    return Run(recipe, source, data, trainer, scores, say)


def _make_previews(recipe: Recipe, source: Source) -> list[Samples]:
    """Return what draws samples on the way, where a recipe asks for it."""
    settings = recipe.samples
    if settings is None:
        return []
    if source.draw is None:
        raise TrainingError(
            f"{recipe.model.name} is a transformer alone, and samples are drawn by its pipeline: name that as the "
            "model, or leave samples out."
        )
    config = SampleConfig(
        conditions=list_conditions(settings, "samples"),
        every=settings.every,
        seed=settings.seed,
        arguments=settings.arguments,
    )
    return [Samples(source.draw, config, recipe.output)]


def resolve_plan(model: ModelMixin, plan: Mapping[str, Any] | str) -> GraftPlan:
    """Return the plan of rules, of rules as text, or of a `plan.json`. Raises `MismatchError` for another model's."""
    # Rules as text end in a bracket, or in the name of an operator.
    if not (isinstance(plan, str) and plan.endswith(".json")):
        return plan_graft(model, plan)
    loaded = GraftPlan.load(plan)
    loaded.check(model)
    return loaded


def _search(recipe: Recipe, source: Source, data: Data, folder: Path) -> GraftPlan:
    """Survey the candidates, unless that was done, and solve for the budget."""
    settings = recipe.search
    assert settings is not None
    # What was found is not measured again: another plan would not fit what was trained since.
    if (folder / PLAN).exists():
        return resolve_plan(source.model, str(folder / PLAN))
    budget: dict[str, Any] = settings.budget
    arguments: dict[str, Any] = {}
    if settings.distill is not None:
        arguments = {
            "batches": _make_batches(recipe, source, data),
            "config": settings.distill,
            "output_dir": folder,
            "resume": True,
        }
    measured = survey(
        source.model,
        settings.candidates,
        _take(data.held_out, settings.samples),
        rounds=settings.rounds,
        seed=recipe.seed,
        budget=budget,
        noise_scheduler=source.noise_scheduler,
        **arguments,
    )
    plan = measured.plan(**budget)
    corrected = measured.correct(source.model, plan, rounds=settings.rounds)
    if corrected.is_reachable(budget):
        measured = corrected
        plan = measured.plan(**budget)
    else:
        predicted = corrected.predicted(plan)
        logger.warning("No plan meets the budget %s as measured; this one leaves %s.", budget, predicted)
    if settings.trials:
        plan = measured.plan(**budget, model=source.model, trials=settings.trials)
    if is_main_process():
        measured.save(folder / SURVEY)
    return plan


def _make_batches(recipe: Recipe, source: Source, data: Data) -> Iterable[Batch]:
    """Return batches of the training data, as the trainer reads them."""
    settings = recipe.data
    maker = BatchMaker(source.model, seed=recipe.seed, workers=settings.workers, collate=data.collate)
    return maker.make_batches(data.train, settings.batch_size * process_state().num_processes)


def _take(batches: list[Any], samples: int) -> list[Any]:
    """Return as many batches as hold a number of samples, or all of them."""
    chosen = []
    count = 0
    for batch in batches:
        if count >= samples:
            break
        chosen.append(batch)
        count += len(batch["sample"])
    return chosen


def _training_arguments(recipe: Recipe) -> GraftTrainingArguments:
    return GraftTrainingArguments(
        output_dir=recipe.output,
        distill=recipe.distill,
        finetune=recipe.finetune,
        per_device_train_batch_size=recipe.data.batch_size,
        dataloader_num_workers=recipe.data.workers,
        seed=recipe.seed,
    )


def _train(run: Run, wanted: tuple[str, ...]) -> None:
    """Run the stages that are wanted, each measured after it where that is wanted, too."""
    is_measured = "evaluate" in wanted and run.recipe.evaluate is not None
    trainer = run.trainer
    if is_measured:
        _measure(run, "original")
    # Resuming a stage that has finished loads its result.
    trainer.distill(resume_from_checkpoint=True)
    # Parts without weights have no stage one.
    if is_measured and run.recipe.distill is not None:
        _measure(run, "after stage one")
    if "finetune" in wanted:
        trainer.finetune(resume_from_checkpoint=True)
    if is_measured and run.recipe.finetune is not None:
        _measure(run, "after stage two")
    if is_measured:
        # The last row is the graft's on its card.
        order = ("original", "after stage one", "after stage two")
        trainer.scores = {name: run.scores[name] for name in order if name in run.scores}
        trainer.save_model()


def _measure(run: Run, name: str) -> None:
    """Measure the model as it is, unless that was done, and store the scores at once."""
    settings = run.recipe.evaluate
    assert settings is not None
    if name not in run.scores:
        run.scores[name] = measure_state(run.recipe, run.source, run.data)
        if is_main_process():
            run.scores[name].save(run.folder / SCORES, name)
        wait_for_all()
    run.say(f"{name}: {run.scores[name]}")


def measure_state(recipe: Recipe, source: Source, data: Data) -> Scores:
    """Measure a model as it is: its denoising loss on held-out batches, and the metrics that the recipe names."""
    settings = recipe.evaluate
    assert settings is not None
    metrics = make_metrics(settings)
    if get_graft(source.model) is None:
        # The original is the teacher itself, and has no distance from it.
        metrics = [metric for metric in metrics if not getattr(metric, "needs_teacher", False)]
    of_samples = [metric for metric in metrics if isinstance(metric, SampleMetric)]
    scores = evaluate(
        source.model,
        data.held_out,
        noise_scheduler=source.noise_scheduler,
        metrics=[metric for metric in metrics if metric not in of_samples],
        seed=settings.seed,
    )
    if not of_samples:
        return scores
    drawn = evaluate(
        source.pipeline or source.model,
        list_evaluated(settings),
        metrics=of_samples,
        sampling=Sampling(**settings.sampling),
        seed=settings.seed,
    )
    # What both protocols name is that of the samples, which the metrics compare.
    protocol = {**scores.protocol, "held_out_samples": scores.protocol["samples"], **drawn.protocol}
    return Scores({**scores.values, **drawn.values}, protocol)


def list_evaluated(settings: EvaluateSettings) -> list[Any]:
    """Return what samples are drawn for: prompts, class labels, or lines of GenEval's metadata."""
    if settings.prompts == "geneval":
        conditions: list[Any] = list(metric_classes.load_geneval_prompts())
    else:
        conditions = list(list_conditions(settings, "evaluate"))
    if settings.samples is None:
        return conditions
    return list(itertools.islice(itertools.cycle(conditions), settings.samples))


def make_metrics(settings: EvaluateSettings) -> list[Any]:
    """Return the metrics that a recipe names. Raises `UnknownNameError` for one that there is not, or its setting."""
    available = {**{name: getattr(metric_classes, name) for name in metric_classes.__all__}, **TESTBED_METRICS}
    classes = {name: value for name, value in available.items() if isinstance(value, type) and name != "Reference"}
    metrics = []
    for name, arguments in settings.metrics.items():
        if name not in classes:
            raise UnknownNameError("metric", name, classes)
        known = [one.name for one in dataclasses.fields(classes[name]) if one.init]
        for setting in arguments:
            if setting not in known:
                raise UnknownNameError(f"setting of {name}", setting, known)
        metrics.append(classes[name](**arguments))
    return metrics


def _benchmark(run: Run) -> None:
    """Measure the cost of a forward, unless that was done."""
    settings = run.recipe.benchmark
    assert settings is not None
    if (run.folder / BENCHMARK).exists() or not is_main_process():
        return
    plan = run.trainer.plan
    # A benchmark installs contenders in turns, the original among them.
    uninstall(run.source.model)
    rules = {"graft": {edit.site.address: edit.config for edit in plan.edits}}
    sizes = settings.sizes or (int(run.source.model.config.sample_size),)
    measured = benchmark(run.source.model, rules, sizes, rounds=settings.rounds)
    measured.save(run.folder / BENCHMARK)
    run.say(f"\n{measured}")


def _share(run: Run) -> None:
    """Push the graft to its repository."""
    settings = run.recipe.share
    assert settings is not None
    if is_main_process():
        address = push_graft(run.folder, settings.repository, private=settings.private)
        run.say(f"Shared: {address}")
