"""The public `dg.card`: describe a grafted model, then render its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from ..cards.about import check_about, check_scores
from ..cards.card import render_card
from ..cards.user_edits import add_note
from ..injection.graft import base_tensors
from ..injection.install import require_graft
from .describe import describe_graft, describe_model


def card(
    model: ModelMixin,
    *,
    source: str = "user/name",
    scores: dict[str, Any] | None = None,
    training_folder: str | Path | None = None,
    **about: Any,
) -> str:
    """Return the card of a grafted model as text; values that were neither given nor measured are left out.

    Args:
        source: the repository or folder that the lines on loading name.
        scores: measured results by row, as `dg.evaluate` gives them; several rows are compared in one table. A row
            named `original` is the ungrafted model's; the last of the others is the graft's, which the Hub shows.
        training_folder: the folder of a training run; its `training.jsonl` adds to what the graft's history says.
        about: `license`, which is that of the base's card unless given, `datasets` and `hardware` of the training,
            `pipeline_tag`, `limits` in words, and `speed`, the rows of `evaluation.benchmark.benchmark`.

    Raises:
        StateError: a model without a graft.
        UnknownNameError: an entry that no card has.
        GraftError: a value that a card cannot hold.
    """
    graft = require_graft(model)
    config = describe_model(model, graft) if graft.is_standalone else describe_graft(model, graft, base_tensors(model))
    config["scores"] = check_scores(scores) or config["scores"]
    config["about"] = check_about(about)
    return add_note(
        render_card(
            model, graft, config, source=source, is_full_model=graft.is_standalone, training_folder=training_folder
        )
    )
