"""Grafts on the Hub, found by the tags of their cards and listed with what the cards measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from huggingface_hub import HfApi, ModelInfo

from ..core.tables import Table, Tabular
from ..errors import GraftError
from ..serialization.hub_errors import clean_token, explain_hub_errors

_TAGS = ("diffusers", "diffusers-graft", "graft")
_MOST_SCORES = 3  # columns of a table


@dataclass(frozen=True)
class FoundGraft:
    """A graft on the Hub, as its card describes it.

    Attributes:
        repository: `user/name`, which `model.set_graft` takes.
        revision: its newest commit, by which it is pinned.
        base_model: the repository of the model it was made on.
        operators: those that it puts in.
        scores: measured values by the names that the card gives them.
        downloads: of the last month.
    """

    repository: str
    revision: str | None = None
    base_model: str | None = None
    operators: tuple[str, ...] = ()
    license: str | None = None
    downloads: int = 0
    scores: dict[str, float] = field(default_factory=dict)


class FoundGrafts(Tabular, Sequence[FoundGraft]):
    """The grafts that a search found; `str(found)` and notebooks show a table."""

    def __init__(self, grafts: Sequence[FoundGraft], question: str):
        self._grafts = tuple(grafts)
        self._question = question

    @overload
    def __getitem__(self, index: int) -> FoundGraft: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[FoundGraft]: ...

    def __getitem__(self, index: int | slice) -> FoundGraft | Sequence[FoundGraft]:
        return self._grafts[index]

    def __len__(self) -> int:
        return len(self._grafts)

    def __iter__(self) -> Iterator[FoundGraft]:
        return iter(self._grafts)

    def to_table(self) -> Table:
        """Return a row a graft: its operators, license and downloads, and the first values that its card measured."""
        if not self:
            return Table([], notes=[f"There is no {self._question} on the Hub. Ask for less, or make the first."])
        rows = []
        for graft in self:
            measured = [f"{name} {value:.4g}" for name, value in list(graft.scores.items())[:_MOST_SCORES]]
            row = (
                graft.repository,
                graft.base_model or "",
                ", ".join(graft.operators),
                "; ".join(measured) or "not measured",
                graft.license or "",
                str(graft.downloads),
            )
            rows.append(row)
        return Table(
            rows, heading=("repository", "base", "operators", "measured", "license", "downloads"), numbers=[5]
        )


def search(
    base_model: str | None = None, *, operator: str | None = None, limit: int = 20, token: str | bool | None = None
) -> FoundGrafts:
    """Return grafts on the Hub: those of a base, those with an operator, or all; most downloads first.

    Args:
        base_model: repository of the model they are made on, such as `"PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"`.
        operator: name of an operator that they put in.
        limit: the most that are listed.

    Raises `FileError` where the Hub cannot be reached or refuses. A search that finds nothing says so as it is shown.

        print(dg.hub.search(base_model="facebook/DiT-XL-2-256"))
    """
    if type(limit) is not int or limit < 1:
        raise GraftError(f"limit is how many grafts are listed, from 1; got {limit!r}. Try 20.")
    tags = ["diffusers-graft", "graft"]
    question = "graft"
    if base_model is not None:
        tags.append(f"base_model:{base_model}")
        question += f" of {base_model}"
    if operator is not None:
        tags.append(operator)
        question += f" with {operator}"
    api = HfApi(token=clean_token(token))
    with explain_hub_errors(None):
        models = list(api.list_models(filter=tags, sort="downloads", limit=limit, cardData=True))
    return FoundGrafts([_read(model) for model in models], question)


def _read(model: ModelInfo) -> FoundGraft:
    """Return what a card says; anybody may write anything there, so entries of other kinds are left out."""
    card: Any = model.card_data
    written = card.to_dict() if card is not None else {}
    tags = written.get("tags")
    names = tags if isinstance(tags, list) else []
    scores: dict[str, float] = {}
    for result in getattr(card, "eval_results", None) or []:
        if isinstance(result.metric_value, int | float):
            scores[str(result.metric_name or result.metric_type)] = float(result.metric_value)
    return FoundGraft(
        repository=model.id,
        revision=model.sha,
        base_model=_text(written.get("base_model")),
        operators=tuple(name for name in names if isinstance(name, str) and name not in _TAGS),
        license=_text(written.get("license_name")) or _text(written.get("license")),
        downloads=model.downloads or 0,
        scores=scores,
    )


def _text(value: Any) -> str | None:
    """Return an entry that is text, the first of a list of them, None for anything else."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None
