"""A graft: a plan and its new parts, beside the model or installed in it.

Every new part is a *seat*: a module for one path of the model. At an attention it is a shallow copy of the original
attention that shares every child it does not change, with the operator as its child `graft` and a generated processor;
at a feed-forward it is a module with the original's call; blocks have a seat at each of their paths, and the first one
holds the operator. Weights are shared until something trains or loads them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers import ModelMixin
from torch import nn

from ..core.context import ContextSlot
from ..core.sites import AttentionSite, BlockSite, FeedForwardSite, Sites
from ..core.tables import Table, Tabular
from ..errors import OperatorError, RuleError
from ..inspection import find_sites, linear_pair, projections
from ..inspection.source import is_causal
from ..operators import AttentionOperator, BlockOperator, Operator
from ..planning.plan import Edit, GraftPlan, build_operator
from .attention_processor import graft_processor
from .block_modules import build_parallel, build_removed
from .hooks import is_skippable, load_from_disk, refuse_hooked
from .module_copy import copy_restarted, copy_shallow, fill_block, untie
from .modules import AttentionSeat, FeedForwardSeat, SkippableFeedForwardSeat
from .waiting_parts import anchor_of


@dataclass(eq=False, repr=False)
class Graft(Tabular):
    """A plan and its weights.

    Attributes:
        plan: the resolved edits.
        seats: new part of every edited path.
        originals: the parts that the seats replace.
        slot: holds the context of the running forward for the parts.
        sites: all sites of the model.
        body: tensors outside the seats that were trained with the graft; while it is installed, their untrained
            values.
        adapters: LoRA layers outside the seats, by path.
        adapter_config: the config that made them.
        history: what was done to the graft: JSON-able rows written by the verbs that train it.
        is_standalone: the model was loaded with its graft, so there are no originals to go back to.
    """

    plan: GraftPlan
    seats: dict[str, nn.Module]
    originals: dict[str, nn.Module]
    slot: ContextSlot
    sites: Sites
    body: dict[str, torch.Tensor] = field(default_factory=dict)
    adapters: dict[str, nn.Module] = field(default_factory=dict)
    adapter_config: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    is_standalone: bool = False

    def to_table(self) -> Table:
        """Return what notebooks show: every new part, its parameters, and the error that stage one left."""
        errors: dict[str, float] = {}
        for stage in self.history:
            # written by other verbs, too, and read from files
            for row in stage.get("sites") or []:
                errors[row["site"]] = row.get("held_out_error", row["relative_error"])
        rows = []
        for edit in self.plan.edits:
            shown = ""
            if edit.site.address in errors:
                shown = f"{errors[edit.site.address]:.1%}"
            count = sum(tensor.numel() for tensor in self.tensors_of(edit.site.path).values())
            rows.append((edit.site.address, str(edit.config), f"{count:,}", shown))
        heading = ("site", "operator", "parameters of its own", "error after stage one")
        return Table(rows, heading=heading, numbers=(2, 3))

    def __str__(self) -> str:
        return str(self.plan)

    def __repr__(self) -> str:
        return f"Graft({len(self.plan.edits)})\n{self}"

    def operators(self) -> dict[str, Operator]:
        """Return the new parts by the path of their site, in forward order."""
        return {edit.site.path: cast(Operator, self.seats[edit.site.path].graft) for edit in self.plan.edits}

    @property
    def is_trainable(self) -> bool:
        """Return whether any new part has weights; where blocks are only removed, none has."""
        return any(next(seat.parameters(), None) is not None for seat in self.seats.values())

    def tensors(self, model: ModelMixin) -> dict[str, torch.Tensor]:
        """Return every parameter and buffer that the graft adds or changes, by its name in the model; no copies."""
        load_from_disk(model)
        tensors = dict(self.body)
        if is_enabled(model):
            # The trained values are in the model, and the body holds the untrained ones.
            trained = _tensors(model)
            tensors = {name: trained[name] for name in self.body}
        for path in self.seats:
            tensors.update({f"{path}.{name}": tensor for name, tensor in self.tensors_of(path).items()})
        return tensors

    def tensors_of(self, path: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one seat, by name inside it, that it does not share with the original."""
        shared = {id(tensor) for tensor in _tensors(self.originals[path]).values()}
        inner = tuple(f"{name}." for name in self._inner_paths(path))
        tensors = {}
        for name, tensor in _tensors(self.seats[path]).items():
            if id(tensor) not in shared and not name.startswith(inner):
                tensors[name] = tensor
        return tensors

    def _inner_paths(self, path: str) -> list[str]:
        """Return the seats inside a block's seat, by path in it."""
        return [other.removeprefix(f"{path}.") for other in self.seats if other.startswith(f"{path}.")]

    def untie(self, path: str, children: set[str] | None = None) -> None:
        """Copy the children (all, unless named) that a seat shares with the original, so that they can be trained."""
        untie(self.seats[path], self.originals[path], children, frozenset(self._inner_paths(path)))


def get_graft(model: ModelMixin) -> Graft | None:
    """Return the graft installed in a model, enabled or not."""
    return vars(model).get("_graft")


def is_enabled(model: ModelMixin) -> bool:
    """Return whether a graft is installed and running."""
    return bool(vars(model).get("_graft_enabled"))


def base_tensors(model: ModelMixin) -> dict[str, torch.Tensor]:
    """Return the tensors of the pretrained model, by name, whatever graft or LoRA is in it now."""
    load_from_disk(model)
    tensors = _tensors(model)
    graft = get_graft(model)
    if graft is None or not is_enabled(model):
        return tensors
    # Seats give way to originals; what training changed outside them, to its values before.
    seats = tuple(f"{path}." for path in graft.seats)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(seats)}
    for path, original in graft.originals.items():
        tensors.update({f"{path}.{name}": tensor for name, tensor in _tensors(original).items()})
    return tensors | graft.body


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's tensors by the names they have without LoRA around them."""
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if ".lora_" not in name:
            tensors[name.replace(".base_layer.", ".")] = tensor
    return tensors


@torch.inference_mode(False)
def build_graft(model: ModelMixin, plan: GraftPlan, *, seed: int = 0) -> Graft:
    """Build new parts beside the intact model, initialised from the parts they replace; the model is not touched.

    Args:
        model: the pretrained model, with a graft or without.
        plan: from `plan_graft`.
        seed: decides random starts; the part of site i draws from `seed + i`, and torch's own generators are left
            alone.

    Raises:
        RuleError: rules in place of a plan.
        MismatchError: a plan for another model.
        OperatorError: a part that no seat can be built for.
        StateError: a random start of layers whose forward hooks have replaced.
    """
    if not isinstance(plan, GraftPlan):
        raise RuleError(f"A graft is built from a plan: dg.plan_graft(model, rules) makes one; got {plan!r}.")
    sites = find_sites(model, blocks=True)
    plan.check(model, sites)
    load_from_disk(model)
    slot = ContextSlot()
    originals = {path: _original(model, path) for edit in plan.edits for path in edit.site.paths}
    seats: dict[str, nn.Module] = {}
    blocks: list[str] = []
    for number, edit in enumerate(plan.edits):
        parts = [originals[path] for path in edit.site.paths]
        for part in parts:
            refuse_hooked(part, edit.site)
        with torch.random.fork_rng(devices=[]), _device_of_starts(parts[0]):
            # torch.manual_seed would seed the generators of GPUs too, which are not forked.
            torch.default_generator.manual_seed(seed + number)
            operator = build_operator(edit.config, edit.site)
            operator.bind_context(slot)
            if isinstance(edit.site, BlockSite):
                built = _build_block_seats(model, edit.site, parts, sites, operator)
                blocks.extend(edit.site.paths)
            else:
                built = [_build_seat(edit, parts[0], operator)]
            _move_to(operator, model, parts[0])
        for seat in built:
            # Blocks side by side are copies that have modes of their own.
            if not getattr(operator, "runs_blocks", False):
                seat.train(parts[0].training)
        operator.train(parts[0].training)
        seats.update(zip(edit.site.paths, built, strict=True))
    # Last, when every part inside the blocks has its seat.
    for path in blocks:
        fill_block(seats, path)
    return Graft(plan, seats, originals, slot, sites)


def _device_of_starts(original: nn.Module) -> torch.device:
    """Return the CPU, so that random starts are the same on every device, or meta where the model is on it."""
    is_meta = any(parameter.is_meta for parameter in original.parameters())
    return torch.device("meta" if is_meta else "cpu")


def _move_to(operator: Operator, model: ModelMixin, original: nn.Module) -> None:
    """Move an operator to the device of the part it replaces, in the dtype that this computes in."""
    anchor = anchor_of(model, original)
    if anchor is None:
        operator.to(model.device, model.dtype)
    else:
        operator.to(anchor.device, anchor.dtype)


def _original(model: ModelMixin, path: str) -> nn.Module:
    """Return the pretrained part at a path, also while a graft is there."""
    graft = get_graft(model)
    if graft is None:
        return model.get_submodule(path)
    # A part inside a replaced block is found in the original block.
    names = path.split(".")
    for end in range(1, len(names) + 1):
        outer = graft.originals.get(".".join(names[:end]))
        if outer is not None:
            return outer.get_submodule(".".join(names[end:]))
    return model.get_submodule(path)


def _build_seat(edit: Edit, original: nn.Module, operator: Operator) -> nn.Module:
    """Build the seat of an attention or a feed-forward."""
    site = edit.site
    is_warm = edit.config.init == "warm"
    if isinstance(site, FeedForwardSite):
        if is_warm:
            operator.init_from(linear_pair(original, site.path))
        seat_class = SkippableFeedForwardSeat if is_skippable(original) else FeedForwardSeat
        return seat_class(site, operator)
    if not isinstance(operator, AttentionOperator):
        return _build_mixer_seat(edit, original, operator)
    _refuse_more_than_projections(original, edit)
    _refuse_looking_ahead(original, edit, operator)
    if is_warm:
        operator.init_from(projections(original, site.path))
    assert isinstance(site, AttentionSite)
    names = tuple(inspect.signature(original.forward).parameters)
    return AttentionSeat(site, operator, names, original.processor)


def _build_mixer_seat(edit: Edit, original: nn.Module, operator: Operator) -> nn.Module:
    """Build the seat of a mixer: the attention itself, with another processor."""
    # A copy, so that children, attributes and the class's own forward are those of the original.
    seat = copy_shallow(original)
    seat.processor = graft_processor(original.processor)
    vars(seat)["graft_site"] = edit.site
    if edit.config.init == "warm":
        operator.init_from(original)
    else:
        for name, child in original._modules.items():
            if child is not None:
                seat._modules[name] = copy_restarted(child)
    seat.graft = operator
    return seat


def _build_block_seats(
    model: ModelMixin, site: BlockSite, blocks: list[nn.Module], sites: Sites, operator: Operator
) -> list[nn.Module]:
    """Build a seat for every block of a site."""
    assert isinstance(operator, BlockOperator)
    if operator.runs_blocks:
        return build_parallel([copy_shallow(block) for block in blocks], operator)
    return build_removed(model, site, blocks, sites, operator)


def _refuse_more_than_projections(original: nn.Module, edit: Edit) -> None:
    """Refuse attentions whose call does more around its projections, which would be lost with them."""
    norms = any(getattr(original, name, None) is not None for name in ("group_norm", "spatial_norm"))
    if norms or getattr(original, "residual_connection", False) or getattr(original, "rescale_output_factor", 1) != 1:
        raise OperatorError(
            f"{edit.config.owner.name} replaces whole attentions, and {edit.site.path} also normalises or adds its "
            "input. Choose a mixer there, such as hyena_x."
        )


def _refuse_looking_ahead(original: nn.Module, edit: Edit, operator: Operator) -> None:
    """Refuse an operator that lets tokens read later ones where the original does not."""
    if is_causal(type(original.processor)) and not operator.stays_causal:
        raise OperatorError(
            f"{edit.config} looks ahead, and {edit.site.path} is causal. Leave it as it is, or choose an operator "
            "that does not, such as gated_deltanet(bidirectional=False)."
        )
