"""What mkdocs adds to pages as it builds them: the operators that the library has now."""

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
