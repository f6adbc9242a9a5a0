"""Rules become a plan: a list of edits, site by site, that no longer depends on any pattern.

Matching happens once, here. What is saved, shared and replayed is the resolved list, so a model that grows a layer
cannot silently change what an old plan means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..core.sites import BLOCK_KINDS, KINDS, Site, Sites
from ..core.storage import read_json, write_json
from ..core.tables import Table, Tabular
from ..errors import FileError, MismatchError, OperatorError, RuleError, UnknownNameError
from ..inspection import find_sites
from ..inspection.blocks import refusals, require_alike, require_one_width, run_of
from ..operators import Mixer, Operator, OperatorConfig, configure, parse_operator

FORMAT = 1

Rules = Mapping[str, Any] | str


@dataclass(frozen=True)
class Edit:
    """One site and the operator that takes its place."""

    site: Site
    config: OperatorConfig

    def __str__(self) -> str:
        return f"{self.site.address} at {self.site.path}: {self.config}"


@dataclass(frozen=True, repr=False)
class GraftPlan(Tabular):
    """What to graft where, for models of one class. Pure data.

    Attributes:
        model_class: name of the diffusers class the plan was made for.
        edits: in forward order, each site at most once.
    """

    model_class: str
    edits: tuple[Edit, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        edits = [{"site": edit.site.to_dict(), **edit.config.to_dict()} for edit in self.edits]
        return {"format": FORMAT, "model_class": self.model_class, "edits": edits}

    @classmethod
    def from_dict(cls, data: Any) -> GraftPlan:
        """Raises `FileError` for data that is no plan, or one of a newer format."""
        try:
            if data["format"] > FORMAT:
                raise FileError(
                    f"This plan has format {data['format']}; this version of diffusers-graft reads up to {FORMAT}. "
                    "Upgrade: pip install -U diffusers-graft"
                )
            edits = [{**edit} for edit in data["edits"]]
            return cls(
                data["model_class"], tuple(Edit(Site.from_dict(edit.pop("site")), configure(edit)) for edit in edits)
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise FileError(f"This is not a graft plan: {error!r}. A plan is what GraftPlan.save wrote.") from error

    def save(self, path: str | Path) -> None:
        """Raises `FileError` for a path that cannot be written."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> GraftPlan:
        """Raises `FileError` for a file that is missing or no plan."""
        return cls.from_dict(read_json(path))

    def check(self, model: ModelMixin, sites: Sites | None = None) -> None:
        """Raise `MismatchError` unless every site of this plan is there in `model`, with the same sizes.

        Args:
            sites: those of the model, blocks among them, where they are known already.
        """
        if type(model).__name__ != self.model_class:
            raise MismatchError(f"This plan was made for {self.model_class}; the model is a {type(model).__name__}.")
        sites = sites or find_sites(model, blocks=any(edit.site.kind in BLOCK_KINDS for edit in self.edits))
        there = {(site.kind, site.path): site for site in sites}
        for edit in self.edits:
            found = there.get((edit.site.kind, edit.site.path))
            if edit.site.kind == "block_run":
                found = _run_at(sites.where(kind="block"), edit.site)
            if found != edit.site:
                raise MismatchError(
                    f"The plan edits {edit.site}, but the model has {found or 'nothing'} there. "
                    "Make the plan on a model of the same configuration."
                )
        _require_apart(self.edits)

    def __repr__(self) -> str:
        return f"GraftPlan({len(self.edits)})\n{self}"

    def to_table(self) -> Table:
        """Return the table that `str` shows."""
        return Table([(edit.site.address, edit.site.path, str(edit.config)) for edit in self.edits])


def plan_graft(model: ModelMixin, rules: Rules) -> GraftPlan:
    """Resolve rules against a model's sites.

    Args:
        rules: `{"self_attention[1::2]": "hyena_x"}`, a value being an operator's name or text, Config or dict; or
            `"self_attention[1::2]=hyena_x(kernel_size=4); feed_forward[0]=mlp(expansion=6)"`.

    Raises:
        RuleError: a rule that cannot be read or matches nothing, or two rules on one site.
        UnknownNameError: an unknown kind, operator or setting.
        OperatorError: an operator that cannot replace that kind, or refuses its settings.
        ModelError: not a model this version can read.
    """
    sites = find_sites(model, blocks=True)
    rules = parse_rules(rules) if isinstance(rules, str) else rules
    if not isinstance(rules, Mapping) or not rules:
        raise RuleError(f'Rules are a dict such as {{"self_attention[1::2]": "hyena_x"}}, not empty; got {rules!r}.')
    claims: dict[Site, tuple[str, OperatorConfig]] = {}
    for key, spec in rules.items():
        config = configure(spec)
        for site in _sites_of(model, sites, key, config):
            if site in claims:
                raise RuleError(
                    f"Two rules claim {site.address}: {claims[site][0]!r} ({claims[site][1]}) and {key!r} ({config}). "
                    "Narrow one of them."
                )
            claims[site] = key, _fitted(config, site)
            if site.kind in BLOCK_KINDS and _has_weights(claims[site][1], site):
                require_one_width(model, site, sites)
    order = {site.path: place for place, site in enumerate(sites.where(kind="block"))}
    runs = sorted((site for site in claims if site.kind == "block_run"), key=lambda site: order[site.path])
    edits = tuple(Edit(site, claims[site][1]) for site in [*sites, *runs] if site in claims)
    _require_apart(edits)
    return GraftPlan(type(model).__name__, edits)


def _sites_of(model: ModelMixin, sites: Sites, key: str, config: OperatorConfig) -> Sites:
    """The sites of a rule; of a `block_run`, its blocks in groups."""
    if not (isinstance(key, str) and key.strip().startswith("block")):
        return select(sites, key)
    run = key.strip().startswith("block_run")
    try:
        chosen = select(sites, key.replace("block_run", "block", 1))
    except RuleError as error:
        reasons = refusals(model, Sites(site for site in sites if site.kind not in BLOCK_KINDS))
        raise RuleError(" ".join([str(error), *reasons])) from error
    return _runs(model, chosen, key, config) if run else chosen


def _runs(model: ModelMixin, blocks: Sites, key: str, config: OperatorConfig) -> Sites:
    size = getattr(config, "group", None) or len(blocks)
    if blocks[-1].paths != (run := run_of(blocks)).paths[-1:] or run.paths != tuple(block.path for block in blocks):
        raise RuleError(f"{key!r} is no run: blocks stand in one list and follow each other, such as block_run[2:6].")
    if len(blocks) % size:
        raise RuleError(f"{key!r} names {len(blocks)} blocks, which do not divide into groups of {size}.")
    runs = Sites(run_of(blocks[start : start + size]) for start in range(0, len(blocks), size))
    if getattr(config.owner, "runs_blocks", False):
        for run in runs:
            require_alike(model, run)
    return runs


def _run_at(blocks: Sites, site: Site) -> Site | None:
    """The run of blocks that a site names, as the model has it."""
    here = {block.path: block for block in blocks}
    if site.path not in here or (site.blocks or 0) > len(blocks):
        return None
    found = [here.get(path) for path in site.paths]
    return None if None in found else run_of(Sites(found))


def _require_apart(edits: tuple[Edit, ...]) -> None:
    """Raise `RuleError` where two edits take one part, or one edits a part inside a block that another takes away."""
    taken: dict[str, Edit] = {}
    for edit in edits:
        for path in edit.site.paths:
            if path in taken:
                raise RuleError(f"Two edits take {path}: {taken[path]} and {edit}. Narrow one of them.")
            taken[path] = edit
    blocks = {path: edit for path, edit in taken.items() if edit.site.kind in BLOCK_KINDS}
    gone = {path: edit for path, edit in blocks.items() if not edit.config.owner.runs_blocks}
    for edit in edits if gone else ():
        if outer := next((one for path, one in gone.items() if edit.site.path.startswith(f"{path}.")), None):
            raise RuleError(f"{edit} lies inside what {outer} takes away. Leave one of them out.")


def _fitted(config: OperatorConfig, site: Site) -> OperatorConfig:
    """The config resolved for the site; building it on the meta device proves that it fits, at no cost."""
    kinds, seen = config.owner.kinds, as_mixed(config, site)
    if seen.kind not in kinds:  # before what a site of another kind lacks is missed
        raise OperatorError(f"{config.owner.name} replaces {' or '.join(kinds)}; {site.path} is {site.address}.")
    config = config.resolved(seen)
    with torch.device("meta"):
        build_operator(config, site)
    return config


def _has_weights(config: OperatorConfig, site: Site) -> bool:
    with torch.device("meta"):
        return any(True for _ in build_operator(config, site).parameters())


def build_operator(config: OperatorConfig, site: Site) -> Operator:
    """The operator of a config for a site of a model."""
    return config.build(as_mixed(config, site))


def as_mixed(config: OperatorConfig, site: Site) -> Site:
    """The site as its operator sees it: mixers are given the image tokens of a joint attention, as of self-attention."""
    mixes = issubclass(config.owner, Mixer) and "joint_attention" not in config.owner.kinds
    return replace(site, kind="self_attention") if mixes and site.kind == "joint_attention" else site


def select(sites: Sites, key: str) -> Sites:
    """The sites a rule key names: `kind[items]`, items an index, a slice, a share such as 75%, or several with commas."""
    match = re.fullmatch(r"\s*(\w+)\s*\[([^\[\]]+)\]\s*", key) if isinstance(key, str) else None
    if match is None:
        raise RuleError(f'{key!r} is not a rule key. Write a kind and indices, such as "self_attention[1::2]".')
    kind, items = match.groups()
    if kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    candidates = sites.where(kind=kind)
    chosen: set[int] = set()
    for item in map(str.strip, items.split(",")):
        if not (indices := _indices(item, len(candidates), key)):
            raise RuleError(
                f"'{kind}[{item}]' matches nothing: the model has {len(candidates)} {kind} sites{_first_and_last(candidates)}."
            )
        chosen.update(indices)
    return Sites(candidates[index] for index in sorted(chosen))


def _first_and_last(candidates: Sites) -> str:
    return f", {candidates[0].address} to {candidates[-1].address}" if candidates else ""


def _indices(item: str, count: int, key: str) -> list[int]:
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,99})?)%", item):
        share = (Fraction(match[1]) / 100).limit_denominator(10**6)  # a third, written with any number of digits
        return _interleaved_indices(share, count, key)
    if re.fullmatch(r"[+-]?\d{1,99}", item):
        index = int(item)
        return [index % count] if -count <= index < count else []
    if re.fullmatch(r"[\d+\-\s]*:[\d+\-\s]*(:[\d+\-\s]*)?", item):
        try:
            return list(range(count)[slice(*(int(part) if part.strip() else None for part in item.split(":")))])
        except ValueError as error:
            raise RuleError(f"{item!r} in {key!r} is not a slice: {error}.") from error
    raise RuleError(f"{item!r} in {key!r} is not an index, a slice or a share such as 50%.")


def _interleaved_indices(share: Fraction, count: int, key: str) -> list[int]:
    """The paper's interleaving: 50% is every second site from 1, 75% keeps 0, 4, 8, ... (arXiv 2506.05340, section 4)."""
    if not 0 < share <= 1:
        raise RuleError(f"A share lies above 0% and up to 100%; {key!r} asks for {float(100 * share):g}%.")
    return [index for index in range(count) if int((index + 1) * share) > int(index * share)]


def interleaved(kind: str, ratio: float) -> str:
    """Rule key for the paper's interleaved choice of a share of the sites of one kind.

    >>> interleaved("self_attention", 0.75)
    'self_attention[75%]'
    """
    if kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    if not isinstance(ratio, Real) or not 0 < ratio <= 1:
        raise RuleError(f"A ratio is a number above 0 and up to 1; got {ratio!r}.")
    return f"{kind}[{100 * float(ratio):.10g}%]"


def parse_rules(text: str) -> dict[str, Any]:
    """Rules from their text form, one or several separated by semicolons. Raises `RuleError` for text it cannot read."""
    rules: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        key, equals, operator = map(str.strip, part.partition("="))
        if not equals or not operator:
            raise RuleError(f'{part!r} is not a rule. Write "self_attention[1::2]=hyena_x(kernel_size=4)".')
        if key in rules:
            raise RuleError(f"{key!r} stands twice in {text!r}.")
        rules[key] = parse_operator(operator)
    return rules
