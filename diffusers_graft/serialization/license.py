"""The license of a base model, as its own card states it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

from ..cards.user_edits import read_front_matter
from .hub_errors import HUB_ERRORS

_CARD = "README.md"
_ENTRIES = ("license", "license_name", "license_link")  # the others go with `license: other`
_SECONDS = 5  # to wait for the Hub: a save should not hang on it


def license_of(folder: str | Path, repo_id: str | None, revision: str | None) -> dict[str, str]:
    """What the card of a base says of its license; empty where there is no card, or it says nothing.

    Args:
        folder: where the base was loaded from, if that is a folder: its card, or that of the pipeline it lies in.
        repo_id, revision: where it came from on the Hub, whose card is read from the cache or asked for.
    """
    nearby = [Path(folder) / _CARD, Path(folder).parent / _CARD] if folder and Path(folder).is_dir() else []
    path = next((path for path in nearby if path.is_file()), None) or _from_hub(repo_id, revision)
    try:
        head = read_front_matter(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, UnicodeDecodeError):
        return {}
    told = {name: head[name] for name in _ENTRIES if isinstance(head.get(name), str)}
    return told if "license" in told else {}


def _from_hub(repo_id: str | None, revision: str | None) -> Path | None:
    if repo_id is None:
        return None
    try:
        return Path(hf_hub_download(repo_id, _CARD, revision=revision, etag_timeout=_SECONDS))
    except HUB_ERRORS:
        return None  # not there, or out of reach: then the card says nothing of it
