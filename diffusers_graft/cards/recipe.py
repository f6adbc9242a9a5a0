"""The recipe of a graft as code: the rules of its plan, and the settings of every stage that trained it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..injection.graft import Graft
from ..training.distill.config import DistillConfig
from ..training.distill.ridge import ClosedFormConfig
from ..training.finetune.config import FinetuneConfig
from .edit_table import group_edits, rule_keys

_CONFIGS: dict[str, type] = {"one": DistillConfig, "two": FinetuneConfig, "closed form": ClosedFormConfig}
_VERBS = {
    "one": "dg.distill(model, graft, batches, {config}, noise_scheduler=noise_scheduler)",
    "two": "dg.finetune(model, batches, {config}, noise_scheduler=noise_scheduler)",
    "closed form": "dg.closed_form(model, graft, batches, {config}, noise_scheduler=noise_scheduler)",
}
# What changes no weights: progress, logs and checkpoints. `sites` of a history are the results of each.
_NO_SETTINGS = ("progress", "log_every", "save_every", "keep", "trackers", "sites")


def recipe(graft: Graft, *, is_full_model: bool) -> str | None:
    """Return Python that makes the graft again, from `model`, `batches` and the installed library.

    None where no rules say how the graft came to be: a full model is loaded without its base.
    """
    if is_full_model or not graft.plan.edits:
        return None
    # rules as text, which plan_graft reads, and not as configs, whose classes would have to be imported
    lines = ["rules = {"]
    for (_, operator), edits in group_edits(graft.plan.edits).items():
        lines += [f'    "{key}": "{operator}",' for key in rule_keys(edits)]
    lines += ["}", "graft = dg.build_graft(model, dg.plan_graft(model, rules))"]
    is_installed = False
    rows = [row for row in graft.history if isinstance(row, dict) and row.get("stage") in _VERBS]
    for number, row in enumerate(rows):
        stage = row["stage"]
        if stage == "closed form" and any(later.get("closed_form") for later in rows[number + 1 : number + 2]):
            # stage one solves it again, as its settings say
            continue
        if stage == "two" and not is_installed:
            lines.append("model.set_graft(graft)")
            is_installed = True
        lines.append(_VERBS[stage].format(config=_call(_CONFIGS[stage], row)))
    return "\n".join(lines)


def _call(config: type, row: dict[str, Any]) -> str:
    """Return the call that makes a config, with the settings of a row that differ from the defaults."""
    settings = []
    defaults = _defaults(config)
    # Rows of earlier versions lack them.
    row = {**getattr(config, "came_later", {}), **row}
    for name, default in defaults.items():
        value = row.get(name, default)
        if name in _NO_SETTINGS or value == default:
            continue
        settings.append(f"{name}={_literal(name, value)}")
    return f"dg.{config.__name__}({', '.join(settings)})"


def _defaults(config: type) -> dict[str, Any]:
    """Return the default of every field, as a history stores it."""
    instance = config()
    stored = instance.to_dict() if hasattr(instance, "to_dict") else {}
    return {
        field.name: stored.get(field.name, getattr(instance, field.name)) for field in dataclasses.fields(instance)
    }


def _literal(name: str, value: Any) -> str:
    if name == "closed_form" and isinstance(value, dict):
        return _call(ClosedFormConfig, value)
    if name == "lora" and isinstance(value, dict):
        names: Sequence[str] = ("r", "lora_alpha", "target_modules")
        return f"peft.LoraConfig({', '.join(f'{key}={value[key]!r}' for key in names if key in value)})"
    # numbers that are not finite are text in a history
    if value in ("Infinity", "-Infinity", "NaN"):
        return f'float("{value}")'
    return repr(value)
