"""Cards that people edit: sections that they changed stay, sections that they left alone are brought up to date.

A note at the end of a card holds a digest of every section as we wrote it, by which changed sections are found.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
OURS = "written by diffusers-graft"
_NOTE = f"<!-- {OURS}: sections you edit are kept when it is saved again. State: {{state}} -->"
_READ_NOTE = re.compile(rf"\n*<!-- {OURS}.*?State: (\{{.*?\}}) -->\s*$", re.DOTALL)

Sections = dict[str, str]  # text of a section by its heading; entries of the front matter by `:key`


def add_note(text: str) -> str:
    """Return a freshly rendered card with the note that holds a digest of every section."""
    digests = {name: _digest(section) for name, section in _split(text).items()}
    return _with_note(text, digests)


def merge_edits(fresh: str, present: str) -> str:
    """Return a fresh card in which everything stays that a person added, changed or removed in the present one.

    A card without our note is a person's, and is returned as it is.
    """
    fresh_text, fresh_digests = _read_note(fresh)
    present_text, present_digests = _read_note(present)
    if present_digests is None or fresh_digests is None:
        return present
    theirs = _split(present_text)
    ours = _split(fresh_text)
    sections: Sections = {}
    # in our order, with sections that a person added behind
    for name in dict.fromkeys([*ours, *theirs]):
        was_changed = name in theirs and present_digests.get(name) != _digest(theirs[name])
        was_removed = name not in theirs and name in present_digests
        if was_changed:
            sections[name] = theirs[name]
        elif name in ours and not was_removed:
            sections[name] = ours[name]
    digests = {name: digest for name, digest in fresh_digests.items() if _digest(sections.get(name, "")) == digest}
    # a removed section is remembered, so that it does not come back
    digests |= {name: digest for name, digest in present_digests.items() if name not in theirs}
    return _with_note(_join(sections), digests)


def rename_source(card: str, source: str, repo_id: str) -> str:
    """Return a card whose lines on loading name a repository in place of a folder; edited sections stay unchanged."""
    text, digests = _read_note(card)
    if digests is None:
        return card
    sections = _split(text)
    for name, section in sections.items():
        if digests.get(name) == _digest(section):
            section = section.replace(f'("{source}"', f'("{repo_id}"')
            section = section.replace(f"- name: {source}\n", f"- name: {repo_id.rpartition('/')[2]}\n")
            sections[name] = section
            digests[name] = _digest(section)
    return _with_note(_join(sections), digests)


def read_front_matter(card: str) -> dict[str, Any]:
    """Return the front matter of a card; empty where it has none, or none that can be read."""
    match = _FRONT_MATTER.match(card)
    if match is None:
        return {}
    try:
        data = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _with_note(text: str, digests: dict[str, str]) -> str:
    note = _NOTE.format(state=json.dumps(digests, separators=(",", ":")))
    return f"{text.rstrip()}\n\n{note}\n"


def _read_note(card: str) -> tuple[str, dict[str, str] | None]:
    """Return a card without its note, and the digests of the note; None without a note that can be read."""
    note = _READ_NOTE.search(card)
    if note is None:
        return card, None
    try:
        return card[: note.start()], json.loads(note[1])
    except ValueError:
        return card, None


def _digest(text: str) -> str:
    # editors strip and add empty lines at the ends
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _split(card: str) -> Sections:
    """Return entries of the front matter and sections in order; the text before the first heading has no name."""
    sections: Sections = {}
    for key, value in read_front_matter(card).items():
        sections[f":{key}"] = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True)
    body = _FRONT_MATTER.sub("", card, count=1)
    name = ""
    is_code = False
    for line in body.splitlines(keepends=True):
        # a line of code may begin as a heading does
        if line.startswith("```"):
            is_code = not is_code
        if line.startswith("## ") and not is_code:
            name = line[3:].strip()
        sections[name] = sections.get(name, "") + line
    return sections


def _join(sections: Sections) -> str:
    entries = "".join(text for name, text in sections.items() if name.startswith(":"))
    body = "\n\n".join(text.strip("\n") for name, text in sections.items() if not name.startswith(":"))
    if entries:
        body = f"---\n{entries}---\n{body}"
    return f"{body}\n"
