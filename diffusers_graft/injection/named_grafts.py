"""Several grafts on one model, by name, on disjoint sites: those that are active run as one graft made of their parts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffusers import ModelMixin

from ..core.context import ContextSlot
from ..errors import StateError, UnknownNameError
from ..planning.plan import GraftPlan
from .graft import Graft, get_graft, is_enabled
from .install import disable, install, uninstall

DEFAULT = "default"
_STATE = "_named_grafts"


@dataclass(frozen=True)
class _State:
    """The grafts of a model by name, the names of those that run, and the graft that this has installed."""

    held: dict[str, Graft]
    active: tuple[str, ...] = ()
    running: Graft | None = None


def _state(model: ModelMixin) -> _State:
    """As it is now, whoever installed or removed a graft meanwhile."""
    state, present = vars(model).get(_STATE, _State({})), get_graft(model)
    if present is state.running:
        return state
    return _State({}) if present is None else _State({DEFAULT: present}, (DEFAULT,), present)


def held(model: ModelMixin) -> dict[str, Graft]:
    """The grafts of a model by name, active or not."""
    return _state(model).held


def active(model: ModelMixin) -> tuple[str, ...]:
    """Names of the grafts that run, in the order in which they were activated."""
    return _state(model).active


def remember(model: ModelMixin, known: dict[str, Graft], names: Sequence[str]) -> None:
    """Note the grafts of a model by name, and which of them are installed now."""
    vars(model)[_STATE] = _State(dict(known), tuple(names), get_graft(model))


def bind(graft: Graft) -> None:
    """Have the parts of a graft read the context where that graft leaves it, after they ran in another's company."""
    for operator in graft.operators().values():
        operator.bind_context(graft.slot)


def activate(model: ModelMixin, names: str | Sequence[str], *, enabled: bool = True) -> None:
    """Run these grafts and no others; without any the model is the original, and the grafts wait.

    Args:
        enabled: False leaves them disabled, as those before them were.

    Raises:
        UnknownNameError: a name that no graft of the model has.
        StateError: two of them claim one site, or train the same weights; the model is then as it was.
    """
    names, known = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names)), held(model)
    for name in names:
        if name not in known:
            raise UnknownNameError("graft of this model", name, known)
    _require_disjoint({name: known[name] for name in names})
    put_away(model)
    if names:
        one = known[names[0]] if len(names) == 1 else _union([known[name] for name in names])
        bind(one)
        install(model, one)
        if not enabled:
            disable(model)
    remember(model, known, names)


def put_away(model: ModelMixin) -> None:
    """The original model; whatever ran goes back, with what training gave it, to the grafts it is made of."""
    graft, names, known = get_graft(model), active(model), held(model)
    if graft is None:
        return
    uninstall(model)
    members = [known[name] for name in names]
    if graft not in members:
        _share_out(graft, members)
    remember(model, known, ())


def forget(model: ModelMixin, name: str | None = None) -> Graft:
    """Take one graft out for good, or all of them; returns it, or what ran.

    Raises `StateError` where there is none, `UnknownNameError` for a name that none has.
    """
    known, running, enabled = held(model), active(model), is_enabled(model)
    if name is None or set(known) == {name}:
        graft = uninstall(model) if get_graft(model) is not None or not known else next(iter(known.values()))
        if graft not in known.values():
            _share_out(graft, [known[each] for each in running])
            bind(graft)
        vars(model).pop(_STATE, None)
        return graft
    if name not in known:
        raise UnknownNameError("graft of this model", name, known)
    put_away(model)
    rest = {other: graft for other, graft in known.items() if other != name}
    remember(model, rest, ())
    activate(model, [other for other in running if other != name], enabled=enabled)
    return known[name]


@contextlib.contextmanager
def without_grafts(model: ModelMixin) -> Iterator[None]:
    """The original model inside, for another graft to be built or loaded on; what ran before runs again afterwards."""
    known, names, enabled = held(model), active(model), is_enabled(model)
    put_away(model)
    vars(model).pop(_STATE, None)
    try:
        yield
    finally:
        if get_graft(model) is not None:
            uninstall(model)
        remember(model, known, ())
        activate(model, names, enabled=enabled)


@contextlib.contextmanager
def alone(model: ModelMixin, name: str) -> Iterator[None]:
    """One graft active by itself inside, the others again afterwards."""
    names, enabled = active(model), is_enabled(model)
    activate(model, name)
    try:
        yield
    finally:
        activate(model, names, enabled=enabled)


def add(model: ModelMixin, name: str, graft: Graft) -> None:
    """Hold a graft that stands beside the model, and run it with those that run; disabled ones stay so, as adapters
    do.
    """
    known, names, enabled = held(model), active(model), is_enabled(model)
    _require_disjoint({**{other: known[other] for other in names}, name: graft})
    put_away(model)
    remember(model, {**known, name: graft}, ())
    activate(model, [*names, name], enabled=enabled or not names)


def _require_disjoint(grafts: dict[str, Graft]) -> None:
    claims: dict[str, str] = {}
    for name, graft in grafts.items():
        for path in graft.seats:
            if path in claims:
                raise StateError(
                    f"The grafts {claims[path]!r} and {name!r} both replace {path}. Activate one of them, or put all rules "
                    "into one plan."
                )
            claims[path] = name
    for path, name in claims.items():
        inside = next((other for other in claims if other.startswith(f"{path}.") and claims[other] != name), None)
        if inside is not None:
            raise StateError(
                f"The graft {name!r} takes {path}, and {claims[inside]!r} replaces {inside} in it. Put all rules into one "
                "plan, or activate one of them."
            )
    for name, graft in grafts.items():
        for trained in (*graft.body, *graft.adapters):
            path = next(
                (path for path in claims if f"{trained}.".startswith(f"{path}.") and claims[path] != name), None
            )
            if path is not None:
                raise StateError(
                    f"The graft {name!r} trained {trained}, which {claims[path]!r} replaces. Activate one."
                )
    for what, having in (
        ("trained weights of the rest of the model", [name for name, graft in grafts.items() if graft.body]),
        ("LoRA layers", [name for name, graft in grafts.items() if graft.adapter_config is not None]),
    ):
        if len(having) > 1:
            raise StateError(
                f"The grafts {' and '.join(map(repr, having))} carry {what} each. Activate one of them at a time."
            )


def _union(grafts: list[Graft]) -> Graft:
    """One graft of all their parts, in forward order."""
    order = {site.path: place for place, site in enumerate(grafts[0].sites)}
    edits = sorted((edit for graft in grafts for edit in graft.plan.edits), key=lambda edit: order[edit.site.path])
    merged = {}
    for entry in dataclasses.fields(Graft):
        values = [getattr(graft, entry.name) for graft in grafts]
        if isinstance(values[0], dict):
            merged[entry.name] = {key: value for each in values for key, value in each.items()}
        elif isinstance(values[0], list):
            merged[entry.name] = [row for each in values for row in each]
    return dataclasses.replace(
        grafts[0],
        **merged,
        plan=GraftPlan(grafts[0].plan.model_class, tuple(edits)),
        slot=ContextSlot(),
        adapter_config=next((graft.adapter_config for graft in grafts if graft.adapter_config is not None), None),
    )


def _share_out(union: Graft, members: list[Graft]) -> None:
    """Give back what the union held while it ran; what training added to it goes to the first."""
    told = sum(len(graft.history) for graft in members)
    for kind in ("body", "adapters"):
        values = getattr(union, kind)
        owners = {name: graft for graft in members for name in getattr(graft, kind)}
        for name, value in values.items():
            getattr(owners.get(name, members[0]), kind)[name] = value
    if union.adapter_config is not None and all(graft.adapter_config is None for graft in members):
        members[0].adapter_config = union.adapter_config
    members[0].history.extend(union.history[told:])
    for graft in members:
        bind(graft)
