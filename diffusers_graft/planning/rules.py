"""Rules: keys that name sites by kind and index, and the text that people write them in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from numbers import Real
from typing import Any, Protocol, TypeAlias, cast

from ..core.sites import KINDS, Sites
from ..errors import RuleError, UnknownNameError
from ..operators import parse_operator

Rules: TypeAlias = Mapping[str, Any] | str

_EXAMPLE = "self_attention[1::2]=hyena_x(kernel_size=4)"


def interleaved(kind: str, ratio: float) -> str:
    """Return the rule key for the paper's interleaved choice of a share of the sites of one kind.

    Raises `UnknownNameError` for an unknown kind, `RuleError` for a ratio that is not above 0 and up to 1.

    >>> interleaved("self_attention", 0.75)
    'self_attention[75%]'
    """
    return f"{kind}[{_share_text(kind, ratio)}]"


def deep(kind: str, ratio: float) -> str:
    """Return the rule key for the last sites of one kind, the paper's `deep` choice.

    Raises `UnknownNameError` for an unknown kind, `RuleError` for a ratio that is not above 0 and up to 1.

    >>> deep("self_attention", 0.5)
    'self_attention[last 50%]'
    """
    return f"{kind}[last {_share_text(kind, ratio)}]"


class MeasuredLocality(Protocol):
    """Anything that knows how local attentions are, as what `dg.analyze` returns does."""

    @property
    def locality(self) -> Mapping[str, float]:
        """Share of attention mass near the query, by the address of a site."""
        ...


def top_local(analysis: MeasuredLocality | Mapping[str, float], ratio: float, *, kind: str = "self_attention") -> str:
    """Return the rule key for the most local attentions of one kind (paper, section 4: `top-local`).

    Args:
        analysis: what `dg.analyze` returned, or shares of attention mass near the query by the address of a site.
        ratio: share of the attentions that were measured, above 0 and up to 1.
        kind: of attention.

    Raises `UnknownNameError` for an unknown kind, `RuleError` for another ratio, for one that chooses no site, and
    where the locality of no such attention was measured.

    >>> top_local({"self_attention[0]": 0.2, "self_attention[1]": 0.6, "self_attention[2]": 0.5}, 0.7)
    'self_attention[1,2]'
    """
    return _by_locality(analysis, ratio, kind, most=True)


def low_local(analysis: MeasuredLocality | Mapping[str, float], ratio: float, *, kind: str = "self_attention") -> str:
    """Return the rule key for the least local attentions of one kind (paper, section 4: `low-local`).

    Arguments and errors are those of `top_local`.

    >>> low_local({"self_attention[0]": 0.2, "self_attention[1]": 0.6, "self_attention[2]": 0.5}, 0.7)
    'self_attention[0,2]'
    """
    return _by_locality(analysis, ratio, kind, most=False)


def _by_locality(analysis: MeasuredLocality | Mapping[str, float], ratio: float, kind: str, *, most: bool) -> str:
    """Return the rule key for the attentions at one end of the order by locality."""
    share = _share_text(kind, ratio)
    # By its attribute, since what measures stands above what plans.
    found: Any = getattr(analysis, "locality", analysis)
    if not isinstance(found, Mapping):
        raise RuleError(f"Attentions are chosen by what dg.analyze(model, batches) returns; got {analysis!r}.")
    shares = cast(Mapping[str, float], found)
    places: dict[int, float] = {}
    for address, value in shares.items():
        match = re.fullmatch(rf"{kind}\[(\d+)\]", address)
        if match is not None:
            places[int(match[1])] = value
    if not places:
        kinds = sorted({address.partition("[")[0] for address in shares}) or ["nothing"]
        raise RuleError(f"There is no locality of {kind}: measured was {', '.join(kinds)}. Pass kind=... of those.")
    count = int(len(places) * _fraction(ratio))
    if not count:
        raise RuleError(f"{share} of {len(places)} {kind} sites is none. Ask for {1 / len(places):.2g} or more.")
    # Equals go by their place, so that a choice never depends on the order of a dict.
    sign = -1 if most else 1
    ranked = sorted(places, key=lambda index: (sign * places[index], index))
    return f"{kind}[{','.join(map(str, sorted(ranked[:count])))}]"


def _share_text(kind: str, ratio: float) -> str:
    """Return a ratio as keys have it, `75%`. Raises what `interleaved` does."""
    if kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    if not isinstance(ratio, Real) or not 0 < ratio <= 1:
        raise RuleError(f"A ratio is a number above 0 and up to 1; got {ratio!r}.")
    return f"{100 * float(ratio):.10g}%"


def _fraction(ratio: float) -> Fraction:
    # A third may be written with any number of digits.
    return Fraction(ratio).limit_denominator(10**6)


def parse_rules(text: str) -> dict[str, Any]:
    """Parse rules in text form, one or several separated by semicolons. Raises `RuleError` for text it cannot read.

    >>> parse_rules("self_attention[0]=hyena_x; feed_forward[:]=mlp(expansion=6)")  # doctest: +ELLIPSIS
    {'self_attention[0]': HyenaX.Config(...), 'feed_forward[:]': Mlp.Config(...)}
    """
    rules: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        key, equals, operator = map(str.strip, part.partition("="))
        if not equals or not operator:
            raise RuleError(f'{part!r} is not a rule. Write "{_EXAMPLE}".')
        # A dict would silently take the last one.
        if key in rules:
            raise RuleError(f"{key!r} is there twice in {text!r}.")
        rules[key] = parse_operator(operator)
    return rules


def select(sites: Sites, key: str) -> Sites:
    """Return the sites that a rule key names, in forward order.

    Args:
        key: `kind[items]`; items are indices, slices, shares such as `75%` (interleaved) or `last 75%`, or several of
            these with commas.

    Raises `RuleError` for a key that cannot be read and for an item that matches nothing, `UnknownNameError` for an
    unknown kind.
    """
    # Keys come from dicts that people write, so they may be of any type.
    text = key if isinstance(key, str) else ""  # pyright: ignore[reportUnnecessaryIsInstance]  # of untyped callers
    match = re.fullmatch(r"\s*(\w+)\s*\[([^\[\]]+)\]\s*", text)
    if match is None:
        raise RuleError(f'{key!r} is not a rule key. Write a kind and indices, such as "self_attention[1::2]".')
    kind, items = match.groups()
    candidates = sites.where(kind=kind)
    chosen: set[int] = set()
    for item in map(str.strip, items.split(",")):
        indices = _indices(item, len(candidates), key)
        if not indices:
            raise RuleError(f"'{kind}[{item}]' matches nothing: the model has {_describe(candidates, kind)}.")
        chosen.update(indices)
    return Sites(candidates[index] for index in sorted(chosen))


def _describe(candidates: Sites, kind: str) -> str:
    count = f"{len(candidates)} {kind} sites"
    if not candidates:
        return count
    return f"{count}, {candidates[0].address} to {candidates[-1].address}"


def _indices(item: str, count: int, key: str) -> list[int]:
    """Return the indices below `count` that one item of a key names."""
    # Digits are bounded, since Python refuses to read numbers of thousands of them, with an error of its own.
    share = re.fullmatch(r"(last\s+)?(\d{1,9}(?:\.\d{1,99})?)%", item)
    if share:
        ratio = (Fraction(share[2]) / 100).limit_denominator(10**6)
        _require_share(ratio, key)
        if share[1]:
            return list(range(count - int(count * ratio), count))
        return _interleaved_indices(ratio, count)
    if re.fullmatch(r"[+-]?\d{1,99}", item):
        index = int(item)
        if not -count <= index < count:
            return []
        return [index % count]
    if re.fullmatch(r"[\d+\-\s]*:[\d+\-\s]*(:[\d+\-\s]*)?", item):
        return _slice_indices(item, count, key)
    raise RuleError(f"{item!r} in {key!r} is not an index, a slice or a share such as 50%.")


def _slice_indices(item: str, count: int, key: str) -> list[int]:
    try:
        parts = [int(part) if part.strip() else None for part in item.split(":")]
        return list(range(count)[slice(*parts)])
    except ValueError as error:
        raise RuleError(f"{item!r} in {key!r} is not a slice: {error}.") from error


def _require_share(share: Fraction, key: str) -> None:
    if not 0 < share <= 1:
        raise RuleError(f"A share lies above 0% and up to 100%; {key!r} asks for {float(100 * share):g}%.")


def _interleaved_indices(share: Fraction, count: int) -> list[int]:
    """Return the paper's interleaving: 50% is every second site from 1, 75% keeps 0, 4, 8, ...

    Source: arXiv 2506.05340, section 4.
    """
    return [index for index in range(count) if int((index + 1) * share) > int(index * share)]
