"""The card of a graft: which parts were exchanged, how they were taught, what was measured. Nothing that was not."""
from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2
import yaml
from diffusers import ModelMixin

from ..graft import Graft
from .files import write_text

CARD = "README.md"
_OURS = "written by diffusers-graft"
_PICTURE = "samples.png"


def write_card(
    stage: Path, folder: Path, model: ModelMixin, graft: Graft, config: dict[str, Any], scores: dict[str, Any],
) -> None:  # fmt: skip
    """Write the card of a graft that is saved to `folder`, unless a person has made the one that is there their own."""
    present = folder / CARD
    if present.exists() and _OURS not in present.read_text(encoding="utf-8"):
        return
    write_text(stage / CARD, render_card(folder, model, graft, config, scores))


def render_card(folder: Path, model: ModelMixin, graft: Graft, config: dict[str, Any], scores: dict[str, Any]) -> str:
    """The card as text; `scores` are rows of `Scores` by name."""
    base = config["base"]["name_or_path"]
    edits = [_edit_row(edit, graft) for edit in graft.plan.edits]
    stages = [row for row in graft.history if "stage" in row]
    template = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined).from_string(_template())
    return template.render(
        front_matter=yaml.safe_dump(_front_matter(base), sort_keys=False).strip(),
        title=f"{type(model).__name__} with {' and '.join(sorted({e.config.owner.name for e in graft.plan.edits}))}",
        base=f"`{base}`" if base else f"a `{type(model).__name__}`",
        summary=_summary(graft), source=folder.name, edits=edits, strip=strip(graft),
        own_parameters=f"{sum(t.numel() for path in graft.seats for t in graft.own_tensors_of(path).values()):,}",
        body=len(graft.body), lora=graft.adapter_config.r if graft.adapter_config else None,
        stages=[_stage_row(row) for row in stages],
        sites=[_site_row(stage, row) for stage in stages for row in stage.get("sites", ())],
        papers=sorted({edit.config.owner.paper for edit in graft.plan.edits} - {""}),
        picture=_PICTURE if (folder / _PICTURE).exists() else None, versions=config["versions"], **_score_table(scores),
    )  # fmt: skip


@functools.cache
def _template() -> str:
    """Beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).parents[1]
    folders = (here / "hub_cards", here.parent / "hub_cards")
    return next(folder / "graft_card.md.jinja" for folder in folders if folder.is_dir()).read_text(encoding="utf-8")


def _front_matter(base: str | None) -> dict[str, Any]:
    data: dict[str, Any] = {"library_name": "diffusers-graft", "tags": ["diffusers", "diffusers-graft", "graft"]}
    return {**data, "base_model": base, "base_model_relation": "adapter"} if base else data


def _summary(graft: Graft) -> str:
    count = len(graft.plan.edits)
    kinds = sorted({edit.site.kind.replace("_", " ") for edit in graft.plan.edits})
    return f"{count} of its parts ({', '.join(kinds)}) replaced"


def strip(graft: Graft) -> str:
    """The layers drawn in a row for each kind: a block for a replaced part, a dot for one that is left alone."""
    lines = []
    for kind in dict.fromkeys(edit.site.kind for edit in graft.plan.edits):
        replaced = {edit.site.index for edit in graft.plan.edits if edit.site.kind == kind}
        layers = range(len(graft.sites.where(kind=kind)))
        lines.append(f"{kind:16} {''.join('█' if index in replaced else '·' for index in layers)}")
    return "\n".join(lines)


def _edit_row(edit, graft: Graft) -> dict[str, str]:
    path = edit.site.path
    before = sum(p.numel() for p in graft.originals[path].parameters())
    after = sum(p.numel() for name, p in graft.seats[path].named_parameters() if ".lora_" not in name)
    start = graft.seats[path].graft.start if edit.config.init == "warm" else "random weights"
    return {"site": edit.site.address, "path": path, "operator": str(edit.config), "start": start,
            "before": f"{before:,}", "after": f"{after:,}"}  # fmt: skip


def _stage_row(row: dict[str, Any]) -> dict[str, str]:
    sites = row.get("sites")
    first, last = (
        (sum(site[key] for site in sites) / len(sites) for key in ("first_loss", "last_loss")) if sites
        else (row["first_loss"], row["last_loss"])
    )  # fmt: skip
    parts = "output layers, solved" if row["stage"] == "closed form" else "new parts"
    trained = parts if sites else row["train"] + (f" and LoRA of rank {row['lora']['r']}" if row["lora"] else "")
    return {"stage": row["stage"], "steps": f"{row['steps']:,}", "lr": f"{row['lr']:g}" if "lr" in row else "none",
            "trained": trained, "first": f"{first:.4g}", "last": f"{last:.4g}"}  # fmt: skip


def _site_row(stage: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    return {"stage": stage["stage"], "site": row["site"], "first": f"{row['first_loss']:.4g}",
            "last": f"{row['last_loss']:.4g}", "error": f"{row['relative_error']:.1%}"}  # fmt: skip


def _score_table(scores: dict[str, Any]) -> dict[str, Any]:
    if not scores:
        return {"scores": [], "columns": [], "protocol": ""}
    columns = list(dict.fromkeys(name for score in scores.values() for name in score.values))
    rows = [
        {"name": name, "values": [f"{score.values[c]:.4g}" if c in score.values else "" for c in columns]}
        for name, score in scores.items()
    ]
    protocol = next(iter(scores.values())).protocol
    text = "Protocol: " + ", ".join(f"{name} {value}" for name, value in protocol.items()) + "."
    return {"scores": rows, "columns": [c.replace("_", " ") for c in columns], "protocol": text}
