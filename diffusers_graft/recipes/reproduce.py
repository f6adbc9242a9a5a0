"""The paper's tables at the scale of the letters: the same rows, trained as the paper says, beside its figures.

Every replaced part starts from random weights. Numbers of samples keep the paper's proportions: its 10 % of ImageNet
are `TEN_PERCENT` letters here, its 8,000 samples of stage one 0.63 % of the same whole.
Paper: Exploring Diffusion Transformer Designs via Grafting, arXiv 2506.05340, Tables 1, 2 and 4, sections 4 and 6.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from .. import testbed
from ..core.storage import append_text, read_text, write_text
from ..core.tables import Table
from ..errors import FileError, UnknownNameError
from ..evaluation.analyze import analyze
from ..injection.graft import build_graft
from ..injection.install import install
from ..planning.plan import plan_graft
from ..planning.rules import low_local, top_local
from ..testbed.sampling import SampleQuality, measure, sample, save_sample_grid, scheduler
from ..training.batches import Batch
from ..training.distill.config import DistillConfig
from ..training.distill.distill import distill
from ..training.finetune.config import FinetuneConfig
from ..training.finetune.finetune import finetune

TEN_PERCENT = 1024
BATCH_SIZE = 16
STEPS = (60, 40)
LEARNING_RATES = (2e-3, 5e-4)
SAMPLES = 200
SAMPLING_STEPS = 6
MEASURES = ("denoising_loss", "frechet_distance", "accuracy")
# The paper prints a cross where the FID is above.
FAILED = 50.0
_ROWS = "rows.jsonl"
_SHOWN = 20
_NAMED = 6  # pairs in another order


@dataclass(frozen=True)
class Training:
    """One graft and its training; rows of several tables may share it.

    Attributes:
        rules: of the plan, as text; empty is the original.
        one: letters of stage one; 0 leaves it out.
        two: letters of stage two; 0 leaves it out.
        loss: of stage one.
        seed: of random starts and data.
    """

    rules: str
    one: int = 0
    two: int = 0
    loss: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        table: its name.
        name: of the row.
        fid: the paper's; None where it has none.
        training: of the row.
    """

    table: str
    name: str
    fid: float | None
    training: Training


TITLES = {
    "self_graft": "Self-grafts: the same operator, trained anew at all layers (Table 2)",
    "replacements": "Replacements of half, three quarters and all of the layers (Table 4)",
    "losses": "Losses of stage one: five layers, no stage two (Table 1)",
    "layers": "Which half of the attentions becomes Hyena-X (section 4)",
    "data": "Twice the data of stage two, half of the attentions (section 4)",
    "pairs": "Pairs of blocks side by side, half the depth (section 6)",
}
_OPERATORS = {
    "Hyena-SE": ("self_attention", "hyena_se(init='random')", (2.73, 3.62, FAILED)),
    "Hyena-X": ("self_attention", "hyena_x(init='random')", (2.74, 3.69, FAILED)),
    "Hyena-Y": ("self_attention", "hyena_y(init='random')", (2.72, 3.66, FAILED)),
    "SWA": ("self_attention", "sliding_window(init='random')", (2.67, 3.09, FAILED)),
    "Mamba-2": ("self_attention", "mamba2(bidirectional=False, init='random')", (2.65, 3.02, FAILED)),
    "MLP r=3": ("feed_forward", "mlp(expansion=3, init='random')", (2.53, 2.61, 2.66)),
    "MLP r=6": ("feed_forward", "mlp(expansion=6, init='random')", (2.38, 2.37, 2.42)),
    "MLP Hyena-X": ("feed_forward", "hyena_mlp(positions=64, init='random')", (2.64, 3.26, FAILED)),
}
_SHARES = ("50%", "75%", "100%")
_EIGHT_THOUSAND = round(TEN_PERCENT * 0.0063 / 0.1)
_FIVE_LAYERS = "0,2,4,6,7"  # 1, 8, 17, 27 and 28 of 28, counted from one


def list_rows(model: ModelMixin) -> list[Row]:
    """Return the rows of all tables. The model is asked how local its attentions are."""
    return [*_self_grafts(), *_replacements(), *_losses(), *_layers(model), *_more_data(), _pairs()]


def _self_grafts() -> Iterator[Row]:
    attention = "self_attention[:]=self_attention(init='random')"
    trainings = {
        "original": (2.27, Training("")),
        "attention, random": (289.23, Training(attention)),
        "attention, stage one": (16.78, Training(attention, _EIGHT_THOUSAND)),
        "attention, both, 0.63 %": (11.26, Training(attention, _EIGHT_THOUSAND, _EIGHT_THOUSAND)),
        "attention, both, 5 %": (2.70, Training(attention, _EIGHT_THOUSAND, TEN_PERCENT // 2)),
        "attention, both, 10 %": (2.49, Training(attention, _EIGHT_THOUSAND, TEN_PERCENT)),
        "attention, stage two alone": (None, Training(attention, 0, TEN_PERCENT)),
    }
    feed_forward = "feed_forward[:]=mlp(expansion=4, init='random')"
    trainings |= {
        "feed-forward, random": (314.72, Training(feed_forward)),
        "feed-forward, both, 10 %": (2.54, Training(feed_forward, _EIGHT_THOUSAND, TEN_PERCENT)),
    }
    for name, (fid, training) in trainings.items():
        yield Row("self_graft", name, fid, training)


def _replacements() -> Iterator[Row]:
    for name, (kind, operator, fids) in _OPERATORS.items():
        for share, fid in zip(_SHARES, fids, strict=True):
            yield Row("replacements", f"{name}, {share}", fid, _both(f"{kind}[{share}]={operator}"))


def _both(rules: str, two: int = TEN_PERCENT) -> Training:
    return Training(rules, _EIGHT_THOUSAND, two)


def _losses() -> Iterator[Row]:
    figures = {"self_attention": (2.51, 2.58, 2.55), "feed_forward": (2.83, 2.33, None)}
    operators = {"self_attention": "self_attention(init='random')", "feed_forward": "mlp(expansion=4, init='random')"}
    for kind, fids in figures.items():
        rules = f"{kind}[{_FIVE_LAYERS}]={operators[kind]}"
        for loss, fid in zip(("l1", "l2", "huber"), fids, strict=True):
            name = f"{kind.replace('_', ' ')}, {loss}"
            yield Row("losses", name, fid, Training(rules, _EIGHT_THOUSAND, loss=loss))


def _layers(model: ModelMixin) -> Iterator[Row]:
    batches = list(testbed.letter_batches(64, 1, steps=2))
    # 32 of 256 tokens are on either side in the paper, and here 8 of 64.
    measured = analyze(model, batches, noise_scheduler=scheduler(), band=8, progress=False)
    keys = {
        "interleaved": (2.74, "self_attention[50%]"),
        "most local": (3.02, top_local(measured, 0.5)),
        "least local": (3.18, low_local(measured, 0.5)),
        "last": (4.00, "self_attention[last 50%]"),
    }
    for name, (fid, key) in keys.items():
        yield Row("layers", name, fid, _both(f"{key}=hyena_x(init='random')"))


def _more_data() -> Iterator[Row]:
    for name, fids in {"Hyena-X": (2.74, 2.61), "SWA": (2.67, 2.62), "Mamba-2": (2.65, 2.55)}.items():
        rules = f"self_attention[50%]={_OPERATORS[name][1]}"
        yield Row("data", f"{name}, 10 %", fids[0], _both(rules))
        yield Row("data", f"{name}, 20 %", fids[1], _both(rules, 2 * TEN_PERCENT))


def _pairs() -> Row:
    # Their blocks start from the pretrained ones, and the paper trains them on 25 %.
    return Row("pairs", "parallel pairs", 2.77, _both("block_pair[:]=parallel", round(2.5 * TEN_PERCENT)))


def reproduce(
    output: Path,
    *,
    tables: Sequence[str] | None = None,
    seeds: int = 1,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = True,
) -> str:
    """Run the rows that are not there yet, and return the report.

    Args:
        output: folder for `rows.jsonl`, `README.md`, `results.csv` and a picture of every table.
        tables: some of the tables; all unless given.
        seeds: runs of each row.
        say: receives the report.

    Raises `UnknownNameError` for a table that there is not, and `FileError` for rows that cannot be read.
    """
    for name in tables or ():
        if name not in TITLES:
            raise UnknownNameError("table", name, TITLES)
    output.mkdir(parents=True, exist_ok=True)
    rows = [row for row in list_rows(testbed.load()) if tables is None or row.table in tables]
    results = _read(output / _ROWS)
    # A training that several tables show runs once.
    wanted: list[Training] = []
    # Seed by seed, so that an interrupted run has complete tables of fewer seeds.
    for seed in range(seeds):
        wanted += dict.fromkeys(replace(row.training, seed=seed) for row in rows)
    with tqdm(wanted, desc="reproduce", unit="run", disable=None if progress else True) as bar:
        for training in bar:
            if training not in results:
                results[training] = _run(training, output)
                row = {"training": asdict(training), "scores": results[training]}
                append_text(output / _ROWS, json.dumps(row) + "\n")
    report = write_report(output, rows, results)
    say(report)
    return report


def _read(path: Path) -> dict[Training, dict[str, float]]:
    """Return the scores that are there. Raises `FileError` for a file of something else."""
    if not path.exists():
        return {}
    text = read_text(path)
    # A process that was killed may have left half a row.
    complete = text[: text.rfind("\n") + 1]
    try:
        rows = [json.loads(line) for line in complete.splitlines()]
        results = {Training(**row["training"]): row["scores"] for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"{path} holds a line that is no row: {error}. Give another --output.") from error
    # Rows are added behind the last complete one.
    if complete != text:
        write_text(path, complete)
    return results


def _run(training: Training, output: Path) -> dict[str, float]:
    """Train one graft, draw its letters, and measure it."""
    # Anew for every run, since the one before left its graft.
    model = testbed.load()
    if training.rules:
        _graft(model, training)
    pictures = output / "pictures"
    pictures.mkdir(exist_ok=True)
    drawn = sample(model, testbed.balanced_labels(_SHOWN), seed=7, progress=False)
    save_sample_grid(pictures / f"{_file_name(training)}.png", {training.rules or "original": drawn})
    return measure(model, SampleQuality(count=SAMPLES, steps=SAMPLING_STEPS), count=SAMPLES).values


def _graft(model: ModelMixin, training: Training) -> None:
    graft = build_graft(model, plan_graft(model, training.rules), seed=1000 * training.seed)
    settings: dict[str, Any] = {"progress": False, "seed": training.seed}
    # Without letters a stage is left out, as in the rows of random starts.
    if training.one:
        config = DistillConfig(steps=STEPS[0], lr=LEARNING_RATES[0], loss=training.loss, **settings)
        distill(model, graft, LetterBatches(training.one, training.seed), config, noise_scheduler=scheduler())
    install(model, graft)
    if training.two:
        papers = {"denoising": 1.0, "distill_output": 0.0, "schedule": "constant_with_warmup"}
        config = FinetuneConfig(steps=STEPS[1], lr=LEARNING_RATES[1], ema_decay=0.98, **papers, **settings)
        finetune(model, LetterBatches(training.two, training.seed), config, noise_scheduler=scheduler())


class LetterBatches:
    """Endless batches of a number of letters, shuffled anew every epoch."""

    def __init__(self, count: int, seed: int):
        self.labels = testbed.balanced_labels(count)
        generator = torch.Generator().manual_seed(100 + seed)
        self.letters = TensorDataset(testbed.draw_letters(self.labels, generator), self.labels)
        self.seed = seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.letters), generator=generator)
            for numbers in order.split(BATCH_SIZE):
                images, labels = self.letters[numbers]
                yield {"sample": images, "class_labels": labels}


def _file_name(training: Training) -> str:
    words = "".join(letter if letter.isalnum() else "-" for letter in training.rules) or "original"
    return f"{words}-{training.one}-{training.two}-{training.loss}-{training.seed}"


def write_report(output: Path, rows: Sequence[Row], results: dict[Training, dict[str, float]]) -> str:
    """Write `README.md`, `results.csv` and the charts of rows, and return the Markdown."""
    from ..evaluation.plots import new_figure

    parts = [
        "# The paper's tables at the scale of the letters",
        f"`diffusers-graft reproduce`: batches of {BATCH_SIZE}, {STEPS[0]} steps of stage one at "
        f"{LEARNING_RATES[0]:g}, {STEPS[1]} of stage two at {LEARNING_RATES[1]:g}; 10 % are {TEN_PERCENT} letters, "
        f"torch {torch.__version__}. Frechet distances and accuracies are of {SAMPLES} samples in {SAMPLING_STEPS} "
        "steps. The paper trains stage one for 200 epochs and stage two for 50,000 steps of 256: rows with most parts "
        "replaced have not recovered here, and differences within the spread of seeds say nothing.",
    ]
    for table, title in TITLES.items():
        chosen = [row for row in rows if row.table == table]
        measured = [(row, _mean(row, results)) for row in chosen]
        measured = [(row, scores) for row, scores in measured if scores]
        if not measured:
            continue
        lines = [[row.name, *_cells(row, scores)] for row, scores in measured]
        heading = ("", *(name.replace("_", " ") for name in MEASURES), "paper's FID")
        text = Table(lines, heading=heading, numbers=range(1, len(heading)), is_ruled=True).to_text()
        parts += [f"## {title}", f"```\n{text}\n```", _compare(measured)]
        figure = new_figure("Charts", 7, 0.32 * len(measured) + 0.9)
        axis = figure.subplots()
        axis.barh([row.name for row, _ in measured][::-1], [one["frechet_distance"] for _, one in measured][::-1])
        axis.set_xlabel("Frechet distance")
        axis.set_title(title, fontsize=9)
        figure.savefig(output / f"{table}.png", dpi=110, bbox_inches="tight")
        parts.append(f"![{title}]({table}.png)")
    report = "\n\n".join(parts) + "\n"
    write_text(output / "README.md", report)
    write_text(output / "results.csv", _to_csv(rows, results))
    return report


def _mean(row: Row, results: dict[Training, dict[str, float]]) -> dict[str, float]:
    """Return the scores of a row, as means over its seeds; none where it has not run."""
    runs = [scores for training, scores in results.items() if replace(training, seed=0) == row.training]
    if not runs:
        return {}
    return {name: statistics.mean(scores[name] for scores in runs) for name in MEASURES}


def _cells(row: Row, scores: dict[str, float]) -> list[str]:
    fid = ""
    if row.fid is not None:
        fid = "> 50" if row.fid == FAILED else f"{row.fid:.2f}"
    return [f"{scores['denoising_loss']:.4f}", f"{scores['frechet_distance']:.1f}", f"{scores['accuracy']:.3f}", fid]


def _compare(measured: Sequence[tuple[Row, dict[str, float]]]) -> str:
    """Say in words in how many pairs of rows our order is the paper's, and which pairs differ."""
    known = [(row, scores["frechet_distance"]) for row, scores in measured if row.fid is not None]
    pairs = [pair for pair in itertools.combinations(known, 2) if pair[0][0].fid != pair[1][0].fid]
    if not pairs:
        return "The paper orders no two of these rows."
    differing = []
    for (row, distance), (other, other_distance) in pairs:
        assert row.fid is not None
        assert other.fid is not None
        if (row.fid < other.fid) != (distance < other_distance):
            better, worse = (row, other) if distance < other_distance else (other, row)
            differing.append((abs(row.fid - other.fid), f"{better.name} before {worse.name}"))
    agreeing = len(pairs) - len(differing)
    words = f"By Frechet distance, {agreeing} of {len(pairs)} pairs of rows are ordered as in the paper."
    if not differing:
        return words
    # Those that the paper tells apart most clearly say most.
    differing.sort(reverse=True)
    named = "; ".join(name for _, name in differing[:_NAMED])
    words += f" Here, and not in the paper: {named}"
    if len(differing) > _NAMED:
        words += f"; and {len(differing) - _NAMED} pairs that lie closer in the paper"
    return f"{words}."


def _to_csv(rows: Sequence[Row], results: dict[Training, dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "rules", "stage one", "stage two", "loss", "seed", *MEASURES, "paper's FID"])
    for row in rows:
        for training, scores in results.items():
            if replace(training, seed=0) == row.training:
                facts = [training.rules, training.one, training.two, training.loss, training.seed]
                writer.writerow([row.table, row.name, *facts, *(scores[name] for name in MEASURES), row.fid])
    return text.getvalue()
