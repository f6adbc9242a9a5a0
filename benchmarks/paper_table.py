"""Cards for the models that were released with the paper on grafting, and an example of a card of our own.

`python -m benchmarks.paper_table hub_cards` writes them; a test compares what is there with what this gives.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub import ModelCardData

from diffusers_graft.cards.card import citation, render_card, template, template_folder
from diffusers_graft.cards.edit_table import draw_layers, edit_rows
from diffusers_graft.core.storage import read_json
from diffusers_graft.injection.graft import Graft, build_graft
from diffusers_graft.injection.install import install
from diffusers_graft.planning.plan import GraftPlan, plan_graft
from diffusers_graft.serialization.describe import versions

_BASE = {"base_model": "facebook/DiT-XL-2-256", "base_model_relation": "finetune", "license": "cc-by-nc-4.0"}
EXAMPLE = "example.md"


def released() -> dict[str, Any]:
    """Return the paper's figures of its models, by their names."""
    return read_json(template_folder() / "paper.json")["models"]


def paper_card(name: str) -> str:
    """The card of a released model."""
    paper = read_json(template_folder() / "paper.json")
    return template("paper_card").render(_facts(name, paper["models"][name], paper))


def _facts(name: str, row: dict[str, Any], paper: dict[str, Any]) -> dict[str, Any]:
    model, graft = _dit_xl(row["rules"])
    operators = sorted({edit.config.owner.name for edit in graft.plan.edits})
    papers = sorted({paper for edit in graft.plan.edits for paper in edit.config.papers})
    where, edits = edit_rows(model, graft)
    summary = f"{len(graft.plan.edits)} of its parts replaced by {' and '.join(operators)}"
    scores = {
        column: value for column, value in zip(paper["columns"], row["scores"], strict=True) if value is not None
    }
    head = {
        "library_name": "diffusers-graft",
        "tags": ["diffusers", "diffusers-graft", "graft", *operators],
        **_BASE,
        "pipeline_tag": "unconditional-image-generation",
        "datasets": ["imagenet-1k"],
    }
    return {
        "name": name,
        "front_matter": ModelCardData(**head).to_yaml(),
        "edits": edits,
        "flops_at": where,
        "self_graft": row.get("self_graft"),
        "summary": summary if operators else f"{row['self_graft']} grafted onto themselves",
        "strip": draw_layers(graft),
        "columns": list(scores),
        "scores": [f"{value:g}" for value in scores.values()],
        "original": [f"{paper['original'][paper['columns'].index(column)]:g}" for column in scores],
        "data": row.get("data", "10%"),
        "citations": [citation(paper) for paper in papers if "2506.05340" not in paper],
    }


def _dit_xl(rules: dict[str, Any]) -> tuple[DiTTransformer2DModel, Graft]:
    """DiT-XL/2 with a graft, shapes alone."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(norm_eps=1e-6)
    model = model.to("meta").eval()
    plan = plan_graft(model, rules) if rules else GraftPlan(type(model).__name__, ())
    graft = build_graft(model, plan)
    install(model, graft)
    return model, graft


def example_card() -> str:
    """Return the card that `save_graft` writes for a graft without measurements."""
    model, graft = _dit_xl({"self_attention[50%]": "hyena_x", "feed_forward[:4]": {"operator": "mlp", "expansion": 3}})
    config = {
        "base": {"name_or_path": "facebook/DiT-XL-2-256"},
        "versions": versions(),
        "about": {"license": "cc-by-nc-4.0"},
    }
    return render_card(model, graft, config, source="user/name", is_full_model=False)


def main() -> None:
    """Write all cards into a folder."""
    folder = Path(sys.argv[1])
    (folder / "paper").mkdir(exist_ok=True)
    (folder / EXAMPLE).write_text(example_card(), encoding="utf-8")
    for name in released():
        (folder / "paper" / f"{name}.md").write_text(paper_card(name), encoding="utf-8")


if __name__ == "__main__":
    main()
