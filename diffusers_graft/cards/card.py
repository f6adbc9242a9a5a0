"""The card of a graft: which parts were exchanged, how they were taught, what was measured. Nothing that was not."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from diffusers import ModelMixin

from ..core.storage import require_regular, write_text
from ..errors import FileError, GraftError, UnknownNameError
from ..evaluation.evaluate import Scores
from ..injection.graft import Graft
from ..training.metrics_log import read_metrics
from .edit_table import edit_rows, own_parameters, strip
from .training_table import draw_curves, training
from .user_edits import add_note, front_matter, merge_edits

CARD = "README.md"
ORIGINAL = "original"  # how rows of scores and of speed name the ungrafted model
_PICTURE = "samples.png"
_ABOUT = ("license", "datasets", "pipeline_tag", "speed", "limits", "hardware", "sample_prompts")
_SPEED = ("tokens", "name", "milliseconds", "ratio", "low", "high")
_TAGS = {
    "DiTTransformer2DModel": "unconditional-image-generation",
    "PixArtTransformer2DModel": "text-to-image",
    "FluxTransformer2DModel": "text-to-image",
    "SD3Transformer2DModel": "text-to-image",
}


def check_scores(scores: dict[str, Scores] | None) -> dict[str, Any]:
    """Measured results by row, as data. Raises `GraftError` for anything but `Scores` by name."""
    rows = {} if scores is None else scores
    if not isinstance(rows, dict) or not all(
        isinstance(n, str) and isinstance(row, Scores) for n, row in rows.items()
    ):
        raise GraftError(
            f'The scores of a card are rows by name, such as {{"grafted": dg.evaluate(...)}}; got {scores!r}.'
        )
    return {name: row.to_dict() for name, row in rows.items()}


def check_about(about: dict[str, Any] | None) -> dict[str, Any]:
    """What a person tells of a graft.

    Raises `UnknownNameError` for an entry that no card has, `GraftError` for a value that it cannot hold.
    """
    for name in about or {}:
        if name not in _ABOUT:
            raise UnknownNameError("entry of a card", name, _ABOUT)
    told = {name: value for name, value in (about or {}).items() if value is not None}
    try:
        json.dumps(told, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GraftError(f"A card holds text, finite numbers and lists of them; got {told!r}: {error}.") from error
    for name, kind in (("datasets", str), ("speed", dict)):
        if not (
            isinstance(told.get(name, []), list | tuple) and all(isinstance(row, kind) for row in told.get(name, []))
        ):
            raise GraftError(f"The {name} of a card are a list of {kind.__name__}; got {told[name]!r}.")
    if lacking := {name for row in told.get("speed", []) for name in _SPEED if name not in row}:
        raise GraftError(
            f"A row of a card's speed lacks {', '.join(sorted(lacking))}: evaluation.benchmark gives whole rows."
        )
    return told


def write_card(
    stage: Path, folder: Path, model: ModelMixin, graft: Graft, config: dict[str, Any], *, is_full_model: bool = False
) -> None:
    """Write the card of a graft that is saved to `folder`; what a person changed in the one that is there is kept."""
    present, picture = _present(folder / CARD), _PICTURE if (folder / _PICTURE).exists() else None
    curves, source = draw_curves(stage, folder, graft.history), folder.resolve().name
    fresh = render_card(
        model,
        graft,
        config,
        source=source,
        is_full_model=is_full_model,
        picture=picture,
        curves=curves,
        journal=folder,
    )
    write_text(stage / CARD, add_note(fresh) if present is None else merge_edits(add_note(fresh), present))


def _present(path: Path) -> str | None:
    """The card that is there."""
    if not path.exists():
        return None
    require_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path} is no UTF-8 text ({error}), so nobody's words in it can be kept: move it away."
        ) from error


def render_card(
    model: ModelMixin,
    graft: Graft,
    config: dict[str, Any],
    *,
    source: str,
    is_full_model: bool,
    picture: str | None = None,
    curves: str | None = None,
    journal: str | Path | None = None,
) -> str:
    """The card as text, without the note by which edits are told apart."""
    base = (config["base"] or {}).get("name_or_path")
    operators = sorted({edit.config.owner.name for edit in graft.plan.edits})
    about, imported = config.get("about") or {}, config.get("imported")
    papers = sorted({edit.config.owner.paper for edit in graft.plan.edits} - {""})
    flops, rows = edit_rows(model, graft)
    return template("graft_card").render(
        front_matter=front_matter(_front_matter(model, config, operators, is_full_model, source)),
        title=type(model).__name__ + (f" with {' and '.join(operators)}" if operators else ""),
        base=f"`{base}`" if base else f"a `{type(model).__name__}`",
        summary=_summary(graft),
        source=source,
        edits=rows,
        contained=is_full_model and bool(config.get("code")),
        flops_at=flops,
        strip=strip(graft),
        is_full_model=is_full_model,
        model_class=type(model).__name__,
        own=own_parameters(graft),
        body=len(graft.body),
        lora=graft.adapter_config.r if graft.adapter_config else None,
        compressed=compressed_summary(config.get("compressed") or {}),
        settings=_settings(model, config),
        imported=imported,
        curves=curves,
        datasets=about.get("datasets") or [],
        papers=papers,
        citations=[citation(paper) for paper in papers if "2506.05340" not in paper],
        picture=picture,
        versions=config["versions"],
        limits=about.get("limits"),
        speed=speed_table(about.get("speed") or []),
        **training(graft.history, read_metrics(journal) if journal else [], about.get("hardware")),
        **_score_table(config.get("scores") or {}),
    )


@functools.cache
def template_folder() -> Path:
    """Beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).parents[1]
    return next(folder for folder in (here / "hub_cards", here.parent / "hub_cards") if folder.is_dir())


@functools.cache
def template(name: str) -> jinja2.Template:
    """One of our templates; what it names must be there."""
    whole_lines = {"keep_trailing_newline": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, **whole_lines)
    return environment.from_string((template_folder() / f"{name}.md.jinja").read_text(encoding="utf-8"))


def _front_matter(
    model: ModelMixin, config: dict[str, Any], operators: list[str], is_full_model: bool, source: str
) -> dict[str, Any]:
    base, about = (config["base"] or {}).get("name_or_path"), config.get("about") or {}
    data = {"library_name": "diffusers-graft", "tags": ["diffusers", "diffusers-graft", "graft", *operators]}
    if base:
        data |= {"base_model": base, "base_model_relation": "finetune" if is_full_model else "adapter"}
    license = about.get("license") or (config.get("imported") or {}).get("license")
    of_base = (config["base"] or {}).get("license")
    data |= {"license": license} if license else of_base if isinstance(of_base, dict) else {}
    tag = about.get("pipeline_tag") or _TAGS.get(type(model).__name__)
    data |= {"pipeline_tag": tag} if tag else {}
    data |= {"datasets": list(about["datasets"])} if about.get("datasets") else {}
    index = _model_index(config.get("scores") or {}, tag, source, about.get("datasets"))
    return data | ({"model-index": index} if index else {})


def _model_index(
    scores: dict[str, Any], tag: str | None, source: str, datasets: list[str] | None
) -> list[dict[str, Any]]:
    """The measured scores of the graft, in the last row that is not the original's, as the Hub reads them."""
    name = next((name for name in reversed(scores) if name != ORIGINAL), None)
    if name is None:
        return []
    row = scores[name]
    values = [(kind, value) for kind, value in row["values"].items() if not isinstance(value, str)]  # text: not finite
    metrics = [{"type": kind, "value": value, "name": f"{kind.replace('_', ' ')} ({name})"} for kind, value in values]
    if not metrics:
        return []
    data = (datasets or ["held-out batches"])[0]
    result = {"task": {"type": tag or "image-generation"}, "dataset": {"name": data, "type": data}, "metrics": metrics}
    return [{"name": source.rpartition("/")[2], "results": [result]}]


def _summary(graft: Graft) -> str:
    kinds = sorted({edit.site.kind.replace("_", " ") for edit in graft.plan.edits})
    return (
        f"{len(graft.plan.edits)} of its parts ({', '.join(kinds)}) replaced"
        if kinds
        else "none of its parts replaced"
    )


def _settings(model: ModelMixin, config: dict[str, Any]) -> list[str]:
    """Settings that differ from diffusers' own, in words."""
    rows = config.get("settings") or []
    alike = Counter((row["attribute"], row["value"]) for row in rows)
    told = [f"`{name}={value:g}` in {n} timestep embeddings (diffusers has 1)" for (name, value), n in alike.items()]
    if rows and (eps := model.config.get("norm_eps")) is not None:
        told.append(f"`norm_eps={eps:g}` in every block (diffusers has 1e-05)")
    return told


def compressed_summary(compressed: dict[str, Any]) -> str | None:
    """How trained tensors were made smaller, and the largest error measured."""
    if not compressed:
        return None
    methods = [row["method"] for row in compressed.values()]
    counts = ", ".join(f"{methods.count(method)} by {method}" for method in sorted(set(methods)))
    before, after = (sum(row[key] for row in compressed.values()) for key in ("bytes_before", "bytes_after"))
    error = max(row["error"] for row in compressed.values())
    return f"{counts}: {before:,} bytes became {after:,}; the largest relative error of an update is {error:.2%}"


def _score_table(scores: dict[str, Any]) -> dict[str, Any]:
    if not scores:
        return {"scores": [], "columns": [], "protocol": ""}
    columns = list(dict.fromkeys(name for score in scores.values() for name in score["values"]))
    rows = [
        {"name": _cell(name), "values": [_score(score["values"].get(column, "")) for column in columns]}
        for name, score in scores.items()
    ]
    protocol = next(iter(scores.values())).get("protocol") or {}
    text = "Protocol: " + ", ".join(f"{name} {value}" for name, value in protocol.items()) + "." if protocol else ""
    return {"scores": rows, "columns": [_cell(c.replace("_", " ")) for c in columns], "protocol": text}


def _score(value: float | str) -> str:
    """As the table shows it; text is of a number that is not finite, or of none."""
    return value if isinstance(value, str) else f"{value:.4g}"


def _cell(name: str) -> str:
    """A person's name for something, so that it breaks no table."""
    return " ".join(name.split()).replace("|", "\\|")


def speed_table(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Measured latencies, and for each graft the fewest tokens from which on it was the faster one."""
    grafts = [row for row in rows if row["name"] != ORIGINAL]
    if not grafts:
        return None
    words = [_break_even(name, [row for row in grafts if row["name"] == name]) for name in _names(grafts)]
    cells = [
        {
            "tokens": f"{row['tokens']:,}",
            "name": _cell(row["name"]),
            "ms": f"{row['milliseconds']:.4g}",
            "ratio": f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
        }
        for row in rows
    ]
    return {"rows": cells, "break_even": "; ".join(words)}


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


def _break_even(name: str, rows: list[dict[str, Any]]) -> str:
    slower = max((row["tokens"] for row in rows if row["ratio"] >= 1), default=0)
    faster = [row["tokens"] for row in rows if row["tokens"] > slower]
    return (
        f"{name} breaks even by {min(faster):,} tokens" if faster else f"{name} was not the faster one at the largest"
    )


def citation(paper: str) -> str:
    """BibTeX from an operator's `paper`: its title, and its number on arXiv."""
    title, _, number = paper.partition(", arXiv ")
    key = "".join(word for word in title.split(":")[0].lower() if word.isalnum())[:24]
    return f"@misc{{{key},\n  title  = {{{title}}},\n  eprint = {{{number.strip()}}},\n  archivePrefix = {{arXiv}}\n}}"
