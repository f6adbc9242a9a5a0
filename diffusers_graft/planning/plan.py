"""Plans: rules resolved to a list of edits, site by site, without any pattern.

Matching happens once, here. What is saved, shared and replayed is the resolved list, so a model that grows a layer
cannot silently change what an old plan means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..core.sites import BLOCK_KINDS, BlockSite, Site, Sites
from ..core.storage import read_json, write_json
from ..core.tables import Table, Tabular
from ..errors import FileError, MismatchError, OperatorError, RuleError
from ..inspection import find_sites
from ..inspection.blocks import join_blocks, refusals, require_alike, require_one_width
from ..operators import BlockOperator, Mixer, Operator, OperatorConfig, configure
from ..operators.registry import names_in, package_of, require_available
from .rules import Rules, parse_rules, select

FORMAT = 1

# The largest models of diffusers have some hundred sites.
_MOST_EDITS = 10_000


@dataclass(frozen=True)
class Edit:
    """One site and the operator that takes its place."""

    site: Site
    config: OperatorConfig

    def __str__(self) -> str:
        return f"{self.site.address} at {self.site.path}: {self.config}"


@dataclass(frozen=True, repr=False)
class GraftPlan(Tabular):
    """A list of edits, site by site, for models of one class. Pure data.

    Attributes:
        model_class: name of the diffusers class the plan was made for.
        edits: in forward order, each site at most once.
    """

    model_class: str
    edits: tuple[Edit, ...]

    def operators(self) -> list[type[Operator]]:
        """Return the operators of the plan and those within others, such as a hybrid's two mixers, by name."""
        waiting = [edit.config for edit in self.edits]
        found: dict[str, type[Operator]] = {}
        while waiting:
            config = waiting.pop()
            found[config.owner.name] = config.owner
            waiting += [value for value in vars(config).values() if isinstance(value, OperatorConfig)]
        return [found[name] for name in sorted(found)]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan JSON-able; `from_dict` reads it back.

        Operators of other packages are listed under `packages` with what brings them, so that somebody who lacks one
        learns what to install.
        """
        edits = [{"site": edit.site.to_dict(), **edit.config.to_dict()} for edit in self.edits]
        data: dict[str, Any] = {"format": FORMAT, "model_class": self.model_class, "edits": edits}
        packages = {operator.name: package_of(operator) for operator in self.operators()}
        packages = {name: package for name, package in packages.items() if package}
        if packages:
            data["packages"] = packages
        return data

    @classmethod
    def from_dict(cls, data: Any) -> GraftPlan:
        """Read what `to_dict` wrote.

        Raises `FileError` for data that is no plan, or one of a newer format; `UnknownNameError` for an operator that
        is not installed; and what a config raises for a setting that it refuses.
        """
        try:
            if data["format"] > FORMAT:
                raise FileError(
                    f"This plan has format {data['format']}; this version of diffusers-graft reads up to {FORMAT}. "
                    "Upgrade: pip install -U diffusers-graft"
                )
            # Bounded and known before the first edit is read, since the file may be hostile.
            _require_edits(data["edits"])
            require_available(names_in(data["edits"]), data.get("packages"))
            edits = tuple(map(_read_edit, data["edits"]))
            model_class = data["model_class"]
        except (KeyError, TypeError, AttributeError) as error:
            raise FileError(f"This is not a graft plan: {error!r}. A plan is what GraftPlan.save wrote.") from error
        if not isinstance(model_class, str):
            raise FileError("This is not a graft plan: the name of its model's class is not text.")
        return cls(model_class, edits)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. Raises `FileError` for a path that cannot be written."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> GraftPlan:
        """Read a plan. Raises `FileError` for a file that is missing or no plan, and what `from_dict` raises."""
        return cls.from_dict(read_json(path))

    def check(self, model: ModelMixin, sites: Sites | None = None) -> None:
        """Raise `MismatchError` unless every site of this plan is there in `model`, with the same sizes.

        Args:
            sites: those of the model, blocks among them, where they are known already.
        """
        # By name, since a plan may come from a process where the class is another object.
        if type(model).__name__ != self.model_class:
            raise MismatchError(f"This plan was made for {self.model_class}; the model is a {type(model).__name__}.")
        if sites is None:
            sites = find_sites(model, blocks=any(edit.site.kind in BLOCK_KINDS for edit in self.edits))
        # By kind too, since a block and a run that begins with it have the same path.
        by_place = {(site.kind, site.path): site for site in sites}
        for edit in self.edits:
            found = by_place.get((edit.site.kind, edit.site.path))
            if edit.site.kind == "block_run":
                found = _find_run(sites.where(kind="block"), edit.site)
            if found != edit.site:
                raise MismatchError(
                    f"The plan edits {edit.site}, but the model has {found or 'nothing'} there. "
                    "Make the plan on a model of the same configuration."
                )
        _require_disjoint(self.edits)

    def to_table(self) -> Table:
        """Return the table that `str` shows."""
        return Table([(edit.site.address, edit.site.path, str(edit.config)) for edit in self.edits])

    def __repr__(self) -> str:
        return f"GraftPlan({len(self.edits)})\n{self}"


def _require_edits(edits: Any) -> None:
    """Raise `FileError` for edits that no plan has, before any of them is read."""
    if not isinstance(edits, list):
        raise FileError("This is not a graft plan: its edits are not a list.")
    if len(edits) > _MOST_EDITS:
        raise FileError(f"This is not a graft plan: it has {len(edits):,} edits, and no model has so many sites.")
    paths = [edit["site"]["path"] for edit in edits]
    if len(set(paths)) < len(paths):
        raise FileError("This is not a graft plan: it edits one site twice.")


def _read_edit(row: Mapping[str, Any]) -> Edit:
    settings = {name: value for name, value in row.items() if name != "site"}
    return Edit(Site.from_dict(row["site"]), configure(settings))


def plan_graft(model: ModelMixin, rules: Rules) -> GraftPlan:
    """Resolve rules against a model's sites: which operator replaces which site.

    Args:
        rules: a dict such as `{"self_attention[1::2]": "hyena_x"}`, whose values are an operator's name, its name with
            settings, a `Config` or a dict; or the same as text,
            `"self_attention[1::2]=hyena_x(kernel_size=4); feed_forward[0]=mlp(expansion=6)"`.

    Raises:
        RuleError: a rule that cannot be read or matches nothing, or two rules on one site.
        UnknownNameError: an unknown kind, operator or setting.
        OperatorError: an operator that cannot replace that kind, or refuses its settings.
        ModelError: not a model this version can read.
    """
    sites = find_sites(model, blocks=True)
    if isinstance(rules, str):
        rules = parse_rules(rules)
    if not isinstance(rules, Mapping) or not rules:
        raise RuleError(f'Rules are a dict such as {{"self_attention[1::2]": "hyena_x"}}, not empty; got {rules!r}.')
    edits: dict[Site, Edit] = {}
    keys: dict[Site, str] = {}
    for key, spec in rules.items():
        config = configure(spec)
        for site in _select_sites(model, sites, key, config):
            if site in edits:
                raise RuleError(
                    f"Two rules claim {site.address}: {keys[site]!r} ({edits[site].config}) and {key!r} ({config}). "
                    "Narrow one of them."
                )
            edits[site] = Edit(site, _resolve(model, config, site, sites))
            keys[site] = key
    ordered = tuple(edits[site] for site in _in_forward_order(edits, sites))
    _require_disjoint(ordered)
    return GraftPlan(type(model).__name__, ordered)


def _in_forward_order(chosen: Iterable[Site], sites: Sites) -> list[Site]:
    """Return sites as the model has them, and runs of blocks, which it does not list, after them."""
    chosen = set(chosen)
    # Runs are made by a rule, so the model's own list does not have them.
    places = {site.path: place for place, site in enumerate(sites.where(kind="block"))}
    runs = [site for site in chosen if site.kind == "block_run"]
    return [site for site in sites if site in chosen] + sorted(runs, key=lambda run: places[run.path])


def _select_sites(model: ModelMixin, sites: Sites, key: str, config: OperatorConfig) -> Sites:
    """Return the sites of a rule; for `block_run`, runs of its blocks."""
    if not (isinstance(key, str) and key.strip().startswith("block")):
        return select(sites, key)
    try:
        chosen = select(sites, key.replace("block_run", "block", 1))
    except RuleError as error:
        reasons = refusals(model, Sites(site for site in sites if site.kind not in BLOCK_KINDS))
        raise RuleError(" ".join([str(error), *reasons])) from error
    if key.strip().startswith("block_run"):
        return _group_blocks(model, chosen, key, config)
    return chosen


def _group_blocks(model: ModelMixin, blocks: Sites, key: str, config: OperatorConfig) -> Sites:
    """Return runs of as many neighbouring blocks as the operator takes, of all of them where it does not say."""
    size = getattr(config, "group", None) or len(blocks)
    # A joined run spans neighbours of one list, but the chosen blocks may have gaps or come from several lists.
    if join_blocks(blocks).paths != tuple(block.path for block in blocks):
        raise RuleError(
            f"{key!r} is not a run: its blocks are in one list and follow each other, as in block_run[2:6]."
        )
    if len(blocks) % size:
        raise RuleError(f"{key!r} names {len(blocks)} blocks, which do not divide into groups of {size}.")
    runs = Sites(join_blocks(blocks[start : start + size]) for start in range(0, len(blocks), size))
    if issubclass(config.owner, BlockOperator) and config.owner.runs_blocks:
        for run in runs:
            require_alike(model, run)
    return runs


def _find_run(blocks: Sites, site: Site) -> Site | None:
    """Return the run of blocks that a site names, as the model has it."""
    by_path = {block.path: block for block in blocks}
    # Compared first, since a site from a file may claim to span any number of blocks.
    if site.path not in by_path or not isinstance(site, BlockSite) or site.blocks > len(blocks):
        return None
    found = [by_path[path] for path in site.paths if path in by_path]
    if len(found) < site.blocks:
        return None
    return join_blocks(found)


def _require_disjoint(edits: tuple[Edit, ...]) -> None:
    """Raise `RuleError` where two edits replace one part, or one edits a part of a block that another removes."""
    by_path: dict[str, Edit] = {}
    for edit in edits:
        for path in edit.site.paths:
            if path in by_path:
                raise RuleError(f"Two edits replace {path}: {by_path[path]} and {edit}. Narrow one of them.")
            by_path[path] = edit
    removed = {path: edit for path, edit in by_path.items() if _removes_blocks(edit)}
    for edit in edits:
        for path, outer in removed.items():
            if edit.site.path.startswith(f"{path}."):
                raise RuleError(f"{edit} lies inside what {outer} takes away. Leave one of them out.")


def _removes_blocks(edit: Edit) -> bool:
    owner = edit.config.owner
    return issubclass(owner, BlockOperator) and not owner.runs_blocks


def _resolve(model: ModelMixin, config: OperatorConfig, site: Site, sites: Sites) -> OperatorConfig:
    """Return the config as it is for a site. Raises `OperatorError` where it does not fit there."""
    kinds = config.owner.kinds
    seen = site_for(config, site)
    # First, since settings may need sizes that sites of another kind do not have.
    if seen.kind not in kinds:
        raise OperatorError(f"{config.owner.name} replaces {' or '.join(kinds)}; {site.path} is {site.address}.")
    config = config.resolved(seen)
    # Building on the meta device proves that it fits, and allocates nothing.
    with torch.device("meta"):
        operator = build_operator(config, site)
    if isinstance(site, BlockSite) and any(True for _ in operator.parameters()):
        require_one_width(model, site, sites)
    return config


def build_operator(config: OperatorConfig, site: Site) -> Operator:
    """Build the operator of a config for a site of a model."""
    return config.build(site_for(config, site))


def site_for(config: OperatorConfig, site: Site) -> Site:
    """Return the site as its operator sees it: to mixers, the image tokens of a joint attention are self-attention."""
    mixes = issubclass(config.owner, Mixer) and "joint_attention" not in config.owner.kinds
    if mixes and site.kind == "joint_attention":
        return replace(site, kind="self_attention")
    return site
