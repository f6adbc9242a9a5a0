"""The license of a base model, as its card states it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

from ..cards.card import CARD
from ..cards.user_edits import read_front_matter
from ..core.storage import read_text
from ..errors import FileError
from .hub_errors import explain_hub_errors

_ENTRIES = ("license", "license_name", "license_link")  # the others go with `license: other`
_SECONDS = 5  # to wait for the Hub: a save should not hang on it


def license_of(folder: str | Path, repo_id: str | None, revision: str | None) -> dict[str, str]:
    """Return the license entries in the card of a base; empty where there is no card, or none in it.

    Args:
        folder: the folder the base was loaded from, if it was one: its card, or that of the pipeline around it.
        repo_id, revision: its repository on the Hub, whose card is read from the cache or downloaded.
    """
    try:
        path = _nearby_card(folder) or _downloaded_card(repo_id, revision)
        head = {} if path is None else read_front_matter(read_text(path))
    except FileError:
        # a license that cannot be read is one that the card does not state
        return {}
    entries = {name: head[name] for name in _ENTRIES if isinstance(head.get(name), str)}
    return entries if "license" in entries else {}


def _nearby_card(folder: str | Path) -> Path | None:
    if not folder or not Path(folder).is_dir():
        return None
    nearby = [Path(folder) / CARD, Path(folder).parent / CARD]
    return next((path for path in nearby if path.is_file()), None)


def _downloaded_card(repo_id: str | None, revision: str | None) -> Path | None:
    if repo_id is None:
        return None
    with explain_hub_errors(repo_id, revision):
        return Path(hf_hub_download(repo_id, CARD, revision=revision, etag_timeout=_SECONDS))
