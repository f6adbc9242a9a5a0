"""What mkdocs adds to pages as it builds them: the operators that there are, and frames around examples."""

import re

import griffe

from diffusers_graft import operators

_PLACE = "<!-- operators: docs/hooks.py lists them -->"
# What every operator has is described once, at its base class.
_FILTERS = '["!^_", "!^(forward|flops|init_from|receptive_field|reference|resolved|uncounted_flops)$"]'


def list_operators() -> str:
    """Return a section of the reference for every operator, as mkdocstrings reads it."""
    options = f"    options: {{heading_level: 3, filters: {_FILTERS}}}"
    return "\n".join(f"::: diffusers_graft.operators.{name}\n{options}" for name in operators.available())


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the list in its place; mkdocs calls this for every page."""
    if _PLACE not in markdown:
        return markdown
    return markdown.replace(_PLACE, list_operators())


class ExampleFrames(griffe.Extension):
    """Examples of docstrings as code: Markdown takes their `>>>` for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Put each example into a block of code; griffe calls this for everything that it reads."""
        if obj.docstring is not None:
            obj.docstring.value = frame_examples(obj.docstring.value)


def frame_examples(text: str) -> str:
    """Return a docstring with each example, from its first prompt to the next empty line, in a block of code."""
    return re.sub(r"^>>> .*?(?=\n\n|\Z)", lambda found: f"```pycon\n{found[0]}\n```", text, flags=re.M | re.S)
