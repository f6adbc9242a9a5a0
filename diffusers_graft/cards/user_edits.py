"""Cards that people edit: what they wrote is kept, what they left as it was is brought up to date."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import yaml

_HEAD = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
OURS = "written by diffusers-graft"
_NOTE = f"<!-- {OURS}: sections you edit are kept when it is saved again. State: {{state}} -->"


def add_note(text: str) -> str:
    """A freshly rendered card with the note of what we wrote, by which later edits are told apart."""
    return _noted(text, {name: _digest(body) for name, body in _parts(text).items()})


def _noted(text: str, state: dict[str, str]) -> str:
    return text.rstrip() + "\n\n" + _NOTE.format(state=json.dumps(state, separators=(",", ":"))) + "\n"


def _written(card: str) -> tuple[str, dict[str, str] | None]:
    """A card without our note, and what that says we wrote; None without a note that can be read."""
    note = re.search(rf"\n*<!-- {OURS}.*?State: (\{{.*?\}}) -->\s*$", card, re.DOTALL)
    try:
        return (card[: note.start()], json.loads(note[1])) if note else (card, None)
    except ValueError:
        return card, None


def merge_edits(fresh: str, present: str) -> str:
    """A fresh card in which everything stands that a person added to, changed in, or removed from the present one.

    A card without our note is a person's own altogether.
    """
    (fresh, new), (body, written) = _written(fresh), _written(present)
    if written is None or new is None:
        return present
    theirs, ours = _parts(body), _parts(fresh)
    parts = {}
    for name in dict.fromkeys([*ours, *theirs]):
        if name in theirs and written.get(name) != _digest(theirs[name]):
            parts[name] = theirs[name]  # changed, or added
        elif name in ours and (name in theirs or name not in written):
            parts[name] = ours[name]  # left alone, or new; what was removed stays so
    state = {name: digest for name, digest in new.items() if _digest(parts.get(name, "")) == digest}
    state |= {name: digest for name, digest in written.items() if name not in theirs}  # removed, and not to come back
    return _noted(_joined(parts), state)


def rename_source(card: str, source: str, repo_id: str) -> str:
    """A card whose lines on loading name a repository in place of a folder; what a person wrote stays as it is."""
    body, written = _written(card)
    parts, ours = _parts(body), written or {}
    for name in [name for name, text in parts.items() if ours.get(name) == _digest(text)]:
        parts[name] = parts[name].replace(f'("{source}"', f'("{repo_id}"')
        parts[name] = parts[name].replace(f"- name: {source}\n", f"- name: {repo_id.rpartition('/')[2]}\n")
        ours[name] = _digest(parts[name])
    return card if written is None else _noted(_joined(parts), ours)


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


def read_front_matter(card: str) -> dict[str, Any]:
    """The front matter of a card; empty where it has none, or none that can be read."""
    match = _HEAD.match(card)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        data = {}
    return data if isinstance(data, dict) else {}


def _parts(card: str) -> dict[str, str]:
    """Keys of the front matter (as `:key`) and sections (by heading, the first as an empty name), in order."""
    data, match = read_front_matter(card), _HEAD.match(card)
    parts = {
        f":{key}": yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True) for key, value in data.items()
    }
    body, name, fenced = card[match.end() if match else 0 :], "", False
    for line in body.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            name = line[3:].strip()
        parts[name] = parts.get(name, "") + line
    return parts


def _joined(parts: dict[str, str]) -> str:
    head = "".join(text for name, text in parts.items() if name.startswith(":"))
    sections = "\n\n".join(text.strip("\n") for name, text in parts.items() if not name.startswith(":"))
    return (f"---\n{head}---\n" if head else "") + sections + "\n"


def front_matter(data: dict[str, Any]) -> str:
    """The data at the head of a card, which the Hub reads."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()
