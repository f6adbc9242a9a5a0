"""The text-to-image run of the paper (Section 5) on scenes: synthetic pairs, both stages, score, time, picture.

    python examples/text_to_image.py [--output runs/text_to_image] [--size 128] [--rows original removed ...]

Every row is trained on pairs that the pipeline drew itself, stage two by LoRA of rank 64, saved, loaded in a new
process, and measured there. The settings of both stages stand in `recipes/scenes_section5.yaml`, the paper's, and in
`recipes/scenes.yaml`, this library's. A row that is finished is not run again, so the same command goes on where it
stopped; `--brief` runs everything at a size that takes minutes. The table is `table.md` in the output folder: complete
after the first seed, with a spread after the next ones.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

import diffusers_graft as dg
from diffusers_graft.core.storage import read_json, write_json
from diffusers_graft.recipes.reading import load_recipe
from diffusers_graft.recipes.run import run_recipe
from diffusers_graft.testbed import scenes

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = "scenes_section5.yaml"
OURS = "scenes.yaml"
# The least harmful of the windows that make a forward 1.15 times as fast at 1,024 tokens and 1.5 times at 4,096.
DEFAULT = {"operator": "neighborhood", "kernel": 9}
HALF = dg.interleaved("self_attention", 0.5)
# The paper's layers 8, 10 ... 18 and 20 to 27 of 28, scaled to 8.
PAPER_LAYERS = "self_attention[2,4,6,7]"
SURVEY = "survey"
# Recipe and plan of every row that is trained.
ROWS = {
    "hyena_x, random start, the paper's layers": (PAPER, {PAPER_LAYERS: {"operator": "hyena_x", "init": "random"}}),
    "hyena_x, random start, interleaved": (PAPER, {HALF: {"operator": "hyena_x", "init": "random"}}),
    "neighborhood 9 x 9, interleaved": (OURS, {HALF: DEFAULT}),
    "neighborhood 9 x 9, the paper's layers": (OURS, {PAPER_LAYERS: DEFAULT}),
    "neighborhood 9 x 9, the survey's layers": (OURS, SURVEY),
    "neighborhood 9 x 9, all layers": (OURS, {"self_attention[:]": DEFAULT}),
}
UNTRAINED = ("original", "removed")
# For `--brief`, over the keys of both recipes.
FEWER_STEPS = ["--distill.steps=2", "--distill.warmup=1", "--finetune.steps=2", "--finetune.warmup=1"]


@dataclass(frozen=True)
class Settings:
    """Settings of the table; those of both stages are in the recipes.

    Attributes:
        size: pixels of a side, of the training pairs and of the pictures that are scored.
        count: prompts of each kind.
        held_out: real scenes that the loss is measured on.
        sampling_steps: of the pairs and of the pictures.
        timed: height and width of the latents, so 256, 1,024 and 4,096 tokens.
        rounds: timed runs of each model.
        is_brief: whether both stages take two steps, on few pairs.
    """

    size: int = 128
    count: int = 15
    held_out: int = 64
    sampling_steps: int = 16
    timed: tuple[int, ...] = (16, 32, 64)
    rounds: int = 5
    is_brief: bool = False


BRIEF = Settings(count=1, held_out=8, sampling_steps=2, timed=(16, 32), rounds=2, is_brief=True)


def read_row_recipe(name: str, overrides: list[str]):
    """Read a recipe with options over its keys, and with the captions whatever the working directory is."""
    captions = RECIPES / "scenes_captions.txt"
    return load_recipe(RECIPES / name, [f"--data.synthetic.prompts={captions}", *overrides])


def draw_pairs(folder: Path, settings: Settings) -> None:
    """Let the pipeline draw the training set of all rows, as the paper's recipe has it."""
    synthetic = read_row_recipe(PAPER, []).data.synthetic
    assert synthetic is not None
    assert isinstance(synthetic.prompts, str)
    count = 16 if settings.is_brief else synthetic.samples
    captions = dg.data.read_prompts(synthetic.prompts)[:count]
    arguments = dict(synthetic.arguments)
    arguments |= {"height": settings.size, "width": settings.size, "num_inference_steps": settings.sampling_steps}
    dg.data.from_pipeline(scenes.pipeline(), captions, count, folder, **arguments)


def held_out_batches(pipeline, settings: Settings) -> list[dict[str, torch.Tensor]]:
    """Latents of real scenes of another seed, with their captions."""
    steps = settings.held_out // 8
    return list(scenes.scene_batches(pipeline, 8, seed=10**6, size=settings.size, steps=steps))


def choose_by_survey(output: Path, settings: Settings) -> dg.GraftPlan:
    """Choose the layers whose replacement does the least harm, at the time of the interleaved plan."""
    pipeline = scenes.pipeline()
    transformer = pipeline.transformer
    folder = output / "survey"
    if not (folder / "survey.json").exists():
        dg.survey(
            transformer,
            {"self_attention[:]": [DEFAULT]},
            held_out_batches(pipeline, settings)[:2],
            noise_scheduler=pipeline.scheduler,
            output_dir=folder,
            rounds=settings.rounds,
        )
    survey = dg.Survey.load(folder / "survey.json")
    interleaved = dg.plan_graft(transformer, {HALF: DEFAULT})
    # The layers are of one shape, so an equal share of the operations is an equal time, whatever the size.
    return survey.plan(flops=survey.predicted(interleaved)["flops"] + 1e-6)


def train_row(name: str, seed: int, folder: Path, output: Path, settings: Settings) -> None:
    """Run both stages of one row by its recipe, which saves the graft; a run that was stopped goes on."""
    recipe, plan = ROWS[name]
    if plan == SURVEY:
        plan = str(output / "survey" / "plan.json")
        choose_by_survey(output, settings).save(plan)
    options = {
        "plan": plan,
        "data.synthetic": None,
        "data.latents": str(output / "pairs"),
        "evaluate": None,
        "benchmark": None,
        "report": False,
        "seed": seed,
        "output": str(folder),
    }
    overrides = [f"--{key}={json.dumps(value)}" for key, value in options.items()]
    if settings.is_brief:
        overrides += FEWER_STEPS
    run_recipe(read_row_recipe(recipe, overrides), last="finetune")


def remove_attention(transformer) -> None:
    """Silence the self-attention of every second block, without training: the control."""
    for block in transformer.transformer_blocks[1::2]:
        block.attn1.register_forward_hook(lambda module, arguments, output: torch.zeros_like(output))


def measure(name: str, seed: int, folder: Path, output: Path, settings: Settings) -> dict[str, float]:
    """Measure score, held-out loss, distance to the original's pictures, and time, of a graft in a folder."""
    pipeline = scenes.pipeline()
    transformer = pipeline.transformer
    values = {}
    if name == "removed":
        remove_attention(transformer)
    elif name != "original":
        transformer.load_graft(folder)
        values["training_seconds"] = sum(row.get("seconds", 0.0) for row in transformer.graft.history)
    held_out = held_out_batches(pipeline, settings)
    values |= dg.evaluate(transformer, held_out, noise_scheduler=pipeline.scheduler).values
    drawn = []
    for prompts in ("seen", "held_out"):
        metric = scenes.SceneScore(
            prompts=prompts, count=settings.count, size=settings.size, steps=settings.sampling_steps
        )
        texts = [line["prompt"] for line in metric.metadata()]
        pictures = scenes.draw_prompts(pipeline, texts, size=metric.size, steps=metric.steps)
        values |= metric.of_pictures(pictures)
        drawn.append(pictures)
    pictures = torch.cat(drawn)
    if name == "original":
        save_file({"pictures": pictures}, output / "original.safetensors")
    original = load_file(output / "original.safetensors")["pictures"]
    values["distance_to_original"] = (pictures - original).abs().mean().item()
    scenes.save_picture_grid(folder / "pictures.png", pictures[:64])
    # Other seeds have the same plan.
    if name not in UNTRAINED and seed == 0:
        values |= time_graft(transformer.graft.plan, settings)
    return values


def time_graft(plan: dg.GraftPlan, settings: Settings) -> dict[str, float]:
    """Time a forward of plan and original in turns: ratios with quartiles, and the tokens from which on it pays.

    LoRA is left out: fused into the weights, it costs nothing.
    """
    rules = {edit.site.address: edit.config for edit in plan.edits}
    measured = dg.benchmark(scenes.pipeline().transformer, {"graft": rules}, settings.timed, rounds=settings.rounds)
    values = {}
    for row in measured:
        if row["name"] == "graft":
            values |= {f"{key}_at_{row['tokens']}": row[key] for key in ("ratio", "low", "high")}
    [break_even] = measured.break_even
    if break_even.tokens is not None:
        values["break_even_tokens"] = break_even.tokens
    return values


def run_row(name: str, seed: int, output: Path, settings: Settings) -> dict[str, float]:
    """Train, save, and measure in a new process, unless all this is done already."""
    folder = output / "rows" / f"{re.sub('[^a-z0-9_]+', '_', name)}-{seed}"
    path = folder / "values.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if name not in UNTRAINED:
            train_row(name, seed, folder, output, settings)
        request = {"name": name, "seed": seed, "folder": str(folder), "output": str(output)}
        command = [sys.executable, __file__, "--measure", json.dumps({**request, "settings": asdict(settings)})]
        subprocess.run(command, check=True)
    return read_json(path)


def answer_request(request: dict) -> None:
    """Measure what another process trained, and write the values beside it."""
    settings = Settings(**request["settings"])
    folder = Path(request["folder"])
    values = measure(request["name"], request["seed"], folder, Path(request["output"]), settings)
    write_json(folder / "values.json", values)


def write_table(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Write one line a row, means over seeds with the spread where there are several, and intervals in brackets."""
    columns = list(dict.fromkeys(key for values in results.values() for one in values for key in one))
    columns = [column for column in columns if not {"low", "high"} & set(re.split(r"[._]", column))]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in results.items():
        cells = [make_cell(values, column) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_cell(values: list[dict[str, float]], column: str) -> str:
    """Write the mean of a column over the seeds of a row; scores and ratios have bounds of their own."""
    numbers = [one[column] for one in values if column in one]
    if not numbers:
        return ""
    text = f"{statistics.mean(numbers):.4g}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers):.2g}"
    low, high = (re.sub("score|ratio", bound, column) for bound in ("low", "high"))
    if low != column:
        bounds = [statistics.mean(one[name] for one in values if name in one) for name in (low, high)]
        text += f" ({bounds[0]:.3g} to {bounds[1]:.3g})"
    return text


def require_same(path: Path, settings: Settings) -> None:
    """Exit where the output folder holds rows of other settings or weights, which one table must not mix."""
    wanted = json.loads(json.dumps({**asdict(settings), "weights": scenes.weights_version()}))
    if path.exists() and read_json(path) != wanted:
        sys.exit(f"{path.parent} holds rows of {read_json(path)}, and {wanted} is asked for. Give another --output.")
    write_json(path, wanted)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/text_to_image"))
    parser.add_argument("--size", type=int, default=Settings.size, help="pixels of a side, a multiple of 8")
    parser.add_argument("--count", type=int, default=Settings.count, help="prompts of each kind")
    parser.add_argument("--rows", nargs="+", default=[*UNTRAINED, *ROWS], choices=[*UNTRAINED, *ROWS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--brief", action="store_true", help="everything, at a size that takes minutes")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.measure is not None:
        answer_request(json.loads(parsed.measure))
        return
    settings = BRIEF if parsed.brief else Settings(size=parsed.size, count=parsed.count)
    parsed.output.mkdir(parents=True, exist_ok=True)
    require_same(parsed.output / "settings.json", settings)
    draw_pairs(parsed.output / "pairs", settings)
    # The original comes first: the other rows are compared with its pictures.
    rows = list(dict.fromkeys(["original", *parsed.rows]))
    runs = [(name, 0) for name in rows if name in UNTRAINED]
    runs += [(name, seed) for seed in parsed.seeds for name in rows if name not in UNTRAINED]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for name, seed in tqdm(runs, desc="rows", unit="row", disable=None):
        results[name].append(run_row(name, seed, parsed.output, settings))
        write_table(results, parsed.output / "table.md")
    sys.stdout.write((parsed.output / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
