"""The front matter of a card, which the Hub reads: base, license, task, data sets, scores and sample pictures."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.benchmark import ORIGINAL
from .hub_metadata import is_dataset_id, task_of

_PICTURE_WITHOUT_PROMPT = "Original and grafted, the same seeds side by side"


def front_matter(
    model: ModelMixin,
    config: dict[str, Any],
    operators: list[str],
    *,
    is_full_model: bool,
    source: str,
    picture: str | None,
) -> ModelCardData:
    """Return the metadata of a graft; entries that are not known are left out.

    Args:
        config: the graft's description.
        operators: names of those in it.
        is_full_model: the weights of the base come along.
        source: the repository or folder that the card is for.
        picture: file name of sample pictures beside the card.
    """
    about = config.get("about") or {}
    base = (config["base"] or {}).get("name_or_path")
    task = about.get("pipeline_tag") or task_of(type(model).__name__)
    datasets = [name for name in about.get("datasets") or [] if is_dataset_id(name)]
    results = eval_results(config.get("scores") or {}, task, datasets)
    relation = None
    if base:
        relation = "finetune" if is_full_model else "adapter"
    # without results the Hub's reader would take a name for one of its entries
    measured: dict[str, Any] = {}
    if results:
        measured = {"model_name": source.rpartition("/")[2], "eval_results": results}
    return ModelCardData(
        library_name="diffusers-graft",
        tags=["diffusers", "diffusers-graft", "graft", *operators],
        base_model=base,
        base_model_relation=relation,
        pipeline_tag=task,
        datasets=datasets or None,
        **measured,
        widget=_widget(about.get("sample_prompts") or [], picture),
        **_license(config),
    )


def _license(config: dict[str, Any]) -> dict[str, Any]:
    """Return the license a person gave, or that of an imported checkpoint, or that of the base."""
    about = config.get("about") or {}
    if "license" in about:
        return {name: about[name] for name in ("license", "license_name", "license_link") if about.get(name)}
    imported = (config.get("imported") or {}).get("license")
    if imported:
        return {"license": imported}
    of_base = (config["base"] or {}).get("license")
    return of_base if isinstance(of_base, dict) else {}


def eval_results(scores: dict[str, Any], task: str | None, datasets: list[str]) -> list[EvalResult]:
    """Return the finite scores of the graft: those in the last row that is not the original's."""
    name = next((name for name in reversed(scores) if name != ORIGINAL), None)
    if name is None:
        return []
    # the Hub wants an id here, too
    dataset_name = dataset_type = next(iter(datasets), "")
    if not datasets:
        dataset_name = "held-out batches"
        dataset_type = "held-out"
    results = []
    for metric, value in scores[name]["values"].items():
        # numbers that are not finite are text in a description
        if not isinstance(value, str):
            result = EvalResult(
                task_type=task or "other",
                dataset_name=dataset_name,
                dataset_type=dataset_type,
                metric_type=metric,
                metric_value=value,
                metric_name=f"{metric.replace('_', ' ')} ({name})",
            )
            results.append(result)
    return results


def _widget(prompts: list[str], picture: str | None) -> list[dict[str, Any]] | None:
    """Return the sample picture as the Hub shows it above a card."""
    if picture is None:
        return None
    return [{"text": "; ".join(prompts) or _PICTURE_WITHOUT_PROMPT, "output": {"url": picture}}]
