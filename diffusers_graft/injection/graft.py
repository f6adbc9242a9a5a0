"""A graft: a plan and its new parts, standing beside the model or installed in it.

Every new part is a *seat*: a module for one path of the model. At an attention it is a shallow copy of the original
attention that shares every child it does not change, with the operator as its child `graft` and a generated processor;
at a feed-forward it is a module with the original's call; blocks have a seat at each of their paths, the operator
being the first one's. Weights are shared until something trains or loads them.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ..core.context import ContextSlot
from ..core.sites import BLOCK_KINDS, Site, Sites
from ..errors import OperatorError, RuleError
from ..inspection import find_sites, linear_pair, projections
from ..inspection.source import is_causal
from ..operators import AttentionOperator, Operator
from ..planning.plan import Edit, GraftPlan, build_operator
from .attention_processor import graft_processor
from .block_modules import fill_block, is_hooked, own_copy, removed, shallow_copy, side_by_side, untie
from .modules import AttentionSeat, FeedForwardSeat

# Quantised and fp8 weights are stored, not computed with; a new part takes the model's dtype there.
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Graft:
    """Plan plus weights.

    Attributes:
        plan: the resolved edits.
        seats: new part of every edited path.
        originals: the parts that the seats stand for.
        slot: where the parts find the context of the running forward.
        sites: all sites of the model.
        body: tensors outside the seats that were trained with the graft; while it is installed, their untrained
            values.
        adapters: LoRA layers outside the seats, by path, with `adapter_config` that made them.
        history: what was done to the graft: JSON-able rows written by the verbs that train it.
        is_standalone: the model was loaded whole, so there are no originals to go back to.
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

    def operators(self) -> dict[str, Operator]:
        """The new parts by the path they stand at, in forward order."""
        return {edit.site.path: self.seats[edit.site.path].graft for edit in self.plan.edits}

    @property
    def is_trainable(self) -> bool:
        """Whether any new part has weights: where blocks are removed alone, there is nothing to teach."""
        return any(True for seat in self.seats.values() for _ in seat.parameters())

    def tensors(self, model: ModelMixin) -> dict[str, torch.Tensor]:
        """Every tensor the graft adds or changes, by its name in the model: parameters and buffers, not copied."""
        trained = _tensors(model) if is_enabled(model) else self.body
        tensors = {name: trained[name] for name in self.body}
        for path in self.seats:
            tensors.update({f"{path}.{name}": tensor for name, tensor in self.tensors_of(path).items()})
        return tensors

    def tensors_of(self, path: str) -> dict[str, torch.Tensor]:
        """The tensors of one seat, by name inside it, that it does not share with the original."""
        shared = {id(tensor) for tensor in _tensors(self.originals[path]).values()}
        inner = tuple(f"{name}." for name in self._inside(path))
        own = {name: tensor for name, tensor in _tensors(self.seats[path]).items() if id(tensor) not in shared}
        return {name: tensor for name, tensor in own.items() if not name.startswith(inner)}

    def _inside(self, path: str) -> list[str]:
        """Seats inside a block's seat, by path in it."""
        return [other.removeprefix(f"{path}.") for other in self.seats if other.startswith(f"{path}.")]

    def untie(self, path: str, children: set[str] | None = None) -> None:
        """Give a seat its own copy of the children (all, unless named) it still shares with the original."""
        untie(self.seats[path], self.originals[path], children, frozenset(self._inside(path)))

    def __str__(self) -> str:
        return str(self.plan)

    def __repr__(self) -> str:
        return f"Graft({len(self.plan.edits)})\n{self}"


def base_tensors(model: ModelMixin) -> dict[str, torch.Tensor]:
    """The tensors of the pretrained model, by name, whatever graft or LoRA sits in it now."""
    tensors, graft = _tensors(model), get_graft(model)
    if graft is None or not is_enabled(model):
        return tensors
    seats = tuple(f"{path}." for path in graft.seats)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(seats)}
    for path, original in graft.originals.items():
        tensors.update({f"{path}.{name}": tensor for name, tensor in _tensors(original).items()})
    return tensors | graft.body


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's tensors by the names they have without LoRA around them."""
    named = module.state_dict(keep_vars=True).items()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in named if ".lora_" not in name}


@torch.inference_mode(False)
def build_graft(model: ModelMixin, plan: GraftPlan, *, seed: int = 0) -> Graft:
    """New parts beside the intact model, initialised from the parts they replace; the model is not touched.

    Args:
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
    sites, slot = find_sites(model, blocks=True), ContextSlot()
    plan.check(model, sites)
    originals = {path: _original(model, path) for edit in plan.edits for path in edit.site.paths}
    seats: dict[str, nn.Module] = {}
    for number, edit in enumerate(plan.edits):
        with torch.random.fork_rng(devices=[]), _device_of_starts(originals[edit.site.path]):
            torch.default_generator.manual_seed(seed + number)  # alone: those of GPUs are not forked
            if edit.site.kind in BLOCK_KINDS:
                seats |= _block_seats(model, edit, originals, slot, sites)
            else:
                seats[edit.site.path] = _build_seat(model, edit, originals[edit.site.path], slot)
    for edit in plan.edits:
        for path in edit.site.paths if edit.site.kind in BLOCK_KINDS else ():
            fill_block(seats, path)
    return Graft(plan, seats, originals, slot, sites)


def _device_of_starts(original: nn.Module) -> torch.device:
    """The CPU, so that random starts are the same on every device; meta, which takes no memory, where the model is on
    it.
    """
    return torch.device("meta" if any(parameter.is_meta for parameter in original.parameters()) else "cpu")


def _original(model: ModelMixin, path: str) -> nn.Module:
    """The pretrained part at a path, also while a graft sits there."""
    present = get_graft(model)
    names = path.split(".")
    for end in range(1, len(names) + 1) if present else ():
        if (outer := present.originals.get(".".join(names[:end]))) is not None:
            return outer.get_submodule(".".join(names[end:]))
    return model.get_submodule(path)


def get_graft(model: ModelMixin) -> Graft | None:
    """The graft installed in a model, enabled or not."""
    return vars(model).get("_graft")


def is_enabled(model: ModelMixin) -> bool:
    """Whether a graft is installed and running."""
    return bool(vars(model).get("_graft_enabled"))


def _build_seat(model: ModelMixin, edit: Edit, original: nn.Module, slot: ContextSlot) -> nn.Module:
    _refuse_hooked(original, edit.site)
    operator = build_operator(edit.config, edit.site)
    operator.bind_context(slot)
    if edit.site.kind == "feed_forward":
        if edit.config.init == "warm":
            operator.init_from(linear_pair(original, edit.site.path))
        seat = FeedForwardSeat(edit.site, operator)
    elif isinstance(operator, AttentionOperator):
        _refuse_more_than_projections(original, edit)
        _refuse_looking_ahead(original, edit, operator)
        if edit.config.init == "warm":
            operator.init_from(projections(original, edit.site.path))
        seat = AttentionSeat(
            edit.site, operator, tuple(inspect.signature(original.forward).parameters), original.processor
        )
    else:
        seat = _attention_seat(edit, original, operator)
    like = next((p for p in original.parameters() if p.dtype in COMPUTE_DTYPES), model)
    operator.to(like.device, like.dtype)
    return seat.train(original.training)


def _block_seats(
    model: ModelMixin, edit: Edit, originals: dict[str, nn.Module], slot: ContextSlot, sites: Sites
) -> dict[str, nn.Module]:
    """A seat for every block of a site, by path."""
    blocks = [originals[path] for path in edit.site.paths]
    for block in blocks:
        _refuse_hooked(block, edit.site)
    operator = build_operator(edit.config, edit.site)
    operator.bind_context(slot)
    like = next((p for p in blocks[0].parameters() if p.dtype in COMPUTE_DTYPES), model)
    operator.to(like.device, like.dtype)
    if operator.runs_blocks:
        seats = side_by_side([shallow_copy(block) for block in blocks], operator)
        operator.train(blocks[0].training)
    else:
        seats = [seat.train(blocks[0].training) for seat in removed(model, edit.site, blocks, sites, operator)]
    return dict(zip(edit.site.paths, seats, strict=True))


def _attention_seat(edit: Edit, original: nn.Module, operator: Operator) -> nn.Module:
    seat = shallow_copy(original)
    seat.processor = graft_processor(original.processor)
    seat.graft_site = edit.site
    if edit.config.init == "warm":
        operator.init_from(original)
    else:
        for name, child in original._modules.items():
            seat._modules[name] = _restarted(child)
    seat.graft = operator
    return seat


def _restarted(child: nn.Module | None) -> nn.Module | None:
    """A copy with fresh random weights, drawn in float32 where operators are made: the same on every device."""
    if child is None:
        return None
    fresh = own_copy(child)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            drawn = copy.deepcopy(module).to(torch.get_default_device(), torch.float32)
            drawn.reset_parameters()
            module.load_state_dict(drawn.state_dict())
    return fresh


def _refuse_more_than_projections(original: nn.Module, edit: Edit) -> None:
    """Steps of the attention's own call, around its projections, would be lost with them."""
    norms = any(getattr(original, name, None) is not None for name in ("group_norm", "spatial_norm"))
    if norms or getattr(original, "residual_connection", False) or getattr(original, "rescale_output_factor", 1) != 1:
        raise OperatorError(
            f"{edit.config.owner.name} replaces whole attentions, and {edit.site.path} also normalises or adds its input. "
            "Choose a mixer there, such as hyena_x."
        )


def _refuse_looking_ahead(original: nn.Module, edit: Edit, operator: Operator) -> None:
    if is_causal(type(original.processor)) and not operator.stays_causal:
        raise OperatorError(
            f"{edit.config} looks ahead, and {edit.site.path} is causal. Leave it as it is, or choose an operator that does "
            "not, such as gated_deltanet(bidirectional=False)."
        )


def _refuse_hooked(original: nn.Module, site: Site) -> None:
    """Offloading and casting hooks replace a module's forward, and a copy of it would run the original's."""
    if is_hooked(original) or any(hasattr(module, "_hf_hook") for module in original.modules()):
        raise OperatorError(
            f"{site.path} carries offloading or casting hooks. Graft first, then enable offloading or layerwise casting."
        )
