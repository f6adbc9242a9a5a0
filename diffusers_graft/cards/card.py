"""The card of a graft: the parts that were replaced, their training and measurements; only what was measured."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import jinja2
from diffusers import ModelMixin

from ..core.storage import read_text, write_text
from ..errors import FileError
from ..injection.graft import Graft
from ..training.metrics_log import read_metrics
from .edit_table import count_new_parameters, draw_layers, edit_rows
from .front_matter import front_matter
from .measurements import compressed_summary, score_table, speed_table
from .recipe import recipe
from .training_table import draw_curves, training_table
from .user_edits import add_note, merge_edits

CARD = "README.md"
_PICTURE = "samples.png"
_GRAFTING_PAPER = "2506.05340"  # the template cites it itself


def write_card(
    destination: Path,
    folder: Path,
    model: ModelMixin,
    graft: Graft,
    config: dict[str, Any],
    *,
    is_full_model: bool = False,
) -> None:
    """Write the card of a graft that is saved; sections that a person changed in the present card stay as they are.

    Args:
        destination: folder that the new files are written to.
        folder: the folder that they will be moved to, with the present card.
        config: the graft's description.
        is_full_model: the weights of the base are saved, too.

    Raises `FileError` for a present card that cannot be read.
    """
    present = _read_present(folder / CARD)
    fresh = render_card(
        model,
        graft,
        config,
        source=folder.resolve().name,
        is_full_model=is_full_model,
        picture=_picture_in(folder),
        curves=draw_curves(destination, folder, graft.history),
        training_folder=folder,
        made_with=_recipe_in(folder),
    )
    text = add_note(fresh)
    if present is not None:
        text = merge_edits(text, present)
    write_text(destination / CARD, text)


def _picture_in(folder: Path) -> str | None:
    """Return the file name of the sample pictures in a folder, None without any."""
    return _PICTURE if (folder / _PICTURE).exists() else None


def _recipe_in(folder: Path) -> str | None:
    """Return the recipe of the run that wrote to a folder, None without one."""
    path = folder / "recipe.yaml"
    return read_text(path) if path.exists() else None


def _read_present(path: Path) -> str | None:
    """Return the card that is there, None without one. Raises `FileError` for one that cannot be read."""
    if not path.exists():
        return None
    try:
        return read_text(path)
    except FileError as error:
        raise FileError(f"{error} Nobody's words in it can be saved with the new card: move it away.") from error


def render_card(
    model: ModelMixin,
    graft: Graft,
    config: dict[str, Any],
    *,
    source: str,
    is_full_model: bool,
    picture: str | None = None,
    curves: str | None = None,
    training_folder: str | Path | None = None,
    made_with: str | None = None,
) -> str:
    """Return the card as text, without the note by which later edits of a person are found.

    Args:
        config: the graft's description.
        source: the repository or folder that the lines on loading name.
        is_full_model: the card is of a full model, not of a graft for a base.
        picture, curves: file names of sample pictures and of training curves beside the card.
        training_folder: folder of a training run, whose `training.jsonl` adds to the graft's history.
        made_with: the recipe of the run, as YAML.
    """
    about = config.get("about") or {}
    imported = config.get("imported")
    # sorted, so that a card that is written again differs only where the graft does
    operators = sorted({edit.config.owner.name for edit in graft.plan.edits})
    papers = sorted({paper for edit in graft.plan.edits for paper in edit.config.papers})
    counted_over, rows = edit_rows(model, graft, is_imported=bool(imported))
    metadata = front_matter(model, config, operators, is_full_model=is_full_model, source=source, picture=picture)
    # what was logged may be more than what the history holds
    metrics = [] if training_folder is None else read_metrics(training_folder)
    title = type(model).__name__
    if operators:
        title += f" with {' and '.join(operators)}"
    return template("graft_card").render(
        front_matter=metadata.to_yaml(),
        title=title,
        base=_base(model, config),
        summary=_summary(graft),
        source=source,
        edits=rows,
        has_code=is_full_model and bool(config.get("code")),
        packages=_packages(config),
        repositories=_repositories(config),
        flops_at=counted_over,
        layers=draw_layers(graft),
        is_full_model=is_full_model,
        model_class=type(model).__name__,
        new_parameters=count_new_parameters(graft),
        body=len(graft.body),
        lora=getattr(graft.adapter_config, "r", None),
        compressed=compressed_summary(config.get("compressed") or {}),
        settings=_settings(model, config),
        imported=imported,
        curves=curves,
        datasets=about.get("datasets") or [],
        recipe=recipe(graft, is_full_model=is_full_model),
        made_with=made_with,
        papers=papers,
        citations=[citation(paper) for paper in papers if _GRAFTING_PAPER not in paper],
        picture=picture,
        sample_prompts=about.get("sample_prompts") or [],
        versions=config["versions"],
        limits=about.get("limits"),
        speed=speed_table(about.get("speed") or []),
        **training_table(graft.history, metrics, about.get("hardware")),
        **score_table(config.get("scores") or {}),
    )


@functools.cache
def template_folder() -> Path:
    """Return the folder of our templates: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    for folder in (package / "hub_cards", package.parent / "hub_cards"):
        if folder.is_dir():
            return folder
    raise FileError(f"The templates of cards are not beside {package}. Install diffusers-graft again.")


@functools.cache
def template(name: str) -> jinja2.Template:
    """Return one of our templates; a name in it that gets no value is an error."""
    # strict, since an empty place in a card would pass unseen
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((template_folder() / f"{name}.md.jinja").read_text(encoding="utf-8"))


def citation(paper: str) -> str:
    """Return BibTeX from an operator's `paper`: its title, and its number on arXiv."""
    title, _, number = paper.partition(", arXiv ")
    # BibTeX keys hold no spaces or punctuation
    key = "".join(letter for letter in title.split(":")[0].lower() if letter.isalnum())[:24]
    return f"@misc{{{key},\n  title  = {{{title}}},\n  eprint = {{{number.strip()}}},\n  archivePrefix = {{arXiv}}\n}}"


def _base(model: ModelMixin, config: dict[str, Any]) -> dict[str, Any]:
    """Return the base as the card names it and as its code loads it.

    `arguments` are those of `from_pretrained`, None where no repository of the base is known.
    """
    described = config["base"] or {}
    name = described.get("name_or_path")
    model_class = type(model).__name__
    if not name:
        return {"words": f"a `{model_class}`", "arguments": None, "model_class": model_class}
    # a class of a person's cannot be imported from diffusers
    if not hasattr(diffusers, model_class):
        return {"words": f"`{name}`", "arguments": None, "model_class": model_class}
    # quoted as JSON, which Python reads, too: names may come from an untrusted description
    arguments = json.dumps(name)
    if described.get("subfolder"):
        arguments += f", subfolder={json.dumps(described['subfolder'])}"
    return {
        "words": f"[`{name}`](https://huggingface.co/{name})",
        "arguments": arguments,
        "model_class": model_class,
    }


def _packages(config: dict[str, Any]) -> list[str]:
    """Return the packages that the graft's operators come from, beside this library, with their versions."""
    rows = (config.get("plan") or {}).get("packages") or {}
    return sorted({f"{row['name']}=={row['version']}" for row in rows.values() if row.get("name")})


def _repositories(config: dict[str, Any]) -> list[str]:
    """Return the lines that load the operators which came from the Hub one by one."""
    rows = (config.get("plan") or {}).get("packages") or {}
    lines = []
    for row in rows.values():
        if row.get("repository"):
            arguments = f"{json.dumps(row['repository'])}, revision={json.dumps(row['revision'])}"
            lines.append(
                f"dg.operators.get({arguments}, trust_remote_code=True)  # code that runs here: read it first"
            )
    return sorted(set(lines))


def _summary(graft: Graft) -> str:
    """Return in words how many parts were replaced, and of which kinds."""
    kinds = sorted({edit.site.kind.replace("_", " ") for edit in graft.plan.edits})
    if not kinds:
        return "none of its parts replaced"
    return f"{len(graft.plan.edits)} of its parts ({', '.join(kinds)}) replaced"


def _settings(model: ModelMixin, config: dict[str, Any]) -> list[str]:
    """Return in words the settings that differ from diffusers'."""
    rows = config.get("settings") or []
    counts = Counter((row["attribute"], row["value"]) for row in rows)
    words = []
    for (name, value), count in counts.items():
        words.append(f"`{name}={value:g}` in {count} timestep embeddings (diffusers has 1)")
    eps = model.config.get("norm_eps")
    if rows and eps is not None:
        words.append(f"`norm_eps={eps:g}` in every block (diffusers has 1e-05)")
    return words
