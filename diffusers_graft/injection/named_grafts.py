"""Several grafts on one model, by name, on disjoint sites: the active ones run as one graft of all their parts."""

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
    """The grafts of a model.

    Attributes:
        grafts: all of them, by name.
        active: names of those that run, in the order in which they were activated.
        installed: the graft that runs: the active one, or one made of their parts.
    """

    grafts: dict[str, Graft]
    active: tuple[str, ...] = ()
    installed: Graft | None = None


def _state(model: ModelMixin) -> _State:
    """Return the present state, whoever installed or removed a graft meanwhile."""
    state = vars(model).get(_STATE, _State({}))
    present = get_graft(model)
    if present is state.installed:
        return state
    # Another verb, or a loader, has installed or removed a graft since.
    if present is None:
        return _State({})
    return _State({DEFAULT: present}, (DEFAULT,), present)


def get_grafts(model: ModelMixin) -> dict[str, Graft]:
    """Return the grafts of a model by name, active or not."""
    return _state(model).grafts


def get_active(model: ModelMixin) -> tuple[str, ...]:
    """Return the names of the grafts that run, in the order in which they were activated."""
    return _state(model).active


def record_grafts(model: ModelMixin, grafts: dict[str, Graft], active: Sequence[str]) -> None:
    """Store the grafts of a model by name, and which of them are installed now."""
    vars(model)[_STATE] = _State(dict(grafts), tuple(active), get_graft(model))


def bind_contexts(graft: Graft) -> None:
    """Make the parts of a graft read its context again, after they ran as parts of another."""
    for operator in graft.operators().values():
        operator.bind_context(graft.slot)


def activate(model: ModelMixin, names: str | Sequence[str], *, enabled: bool = True) -> None:
    """Run these grafts and no others; without any the model is the original, and the grafts wait.

    Args:
        model: that has the grafts.
        names: of the grafts.
        enabled: False leaves them disabled, as those before them were.

    Raises:
        UnknownNameError: a name that no graft of the model has.
        StateError: two of them claim one site, or train the same weights; the model is then as it was.
    """
    if isinstance(names, str):
        names = [names]
    names = tuple(dict.fromkeys(names))
    grafts = get_grafts(model)
    for name in names:
        _require_name(name, grafts)
    chosen = {name: grafts[name] for name in names}
    _require_disjoint(chosen)
    put_away(model)
    if chosen:
        graft = _join(list(chosen.values()))
        bind_contexts(graft)
        install(model, graft)
        if not enabled:
            disable(model)
    record_grafts(model, grafts, names)


def put_away(model: ModelMixin) -> None:
    """Make the model the original; each graft gets back its parts, with what training gave them."""
    graft = get_graft(model)
    if graft is None:
        return
    grafts = get_grafts(model)
    members = [grafts[name] for name in get_active(model)]
    uninstall(model)
    if graft not in members:
        _split(graft, members)
    record_grafts(model, grafts, ())


def remove(model: ModelMixin, name: str | None = None) -> Graft:
    """Take one graft out for good, or all of them.

    Returns:
        The graft of that name, or the one that ran.

    Raises:
        StateError: the model has no graft.
        UnknownNameError: a name that none has.
    """
    grafts = get_grafts(model)
    active = get_active(model)
    if name is None or set(grafts) == {name}:
        return _remove_all(model, grafts, active)
    _require_name(name, grafts)
    enabled = is_enabled(model)
    put_away(model)
    rest = {other: graft for other, graft in grafts.items() if other != name}
    record_grafts(model, rest, ())
    activate(model, [other for other in active if other != name], enabled=enabled)
    return grafts[name]


def _remove_all(model: ModelMixin, grafts: dict[str, Graft], active: Sequence[str]) -> Graft:
    all_wait = get_graft(model) is None and bool(grafts)
    graft = next(iter(grafts.values())) if all_wait else uninstall(model)
    if graft not in grafts.values():
        _split(graft, [grafts[name] for name in active])
        bind_contexts(graft)
    vars(model).pop(_STATE, None)
    return graft


@contextlib.contextmanager
def without_grafts(model: ModelMixin) -> Iterator[None]:
    """Make the model the original inside, for another graft to be built or loaded; afterwards its grafts run again."""
    grafts = get_grafts(model)
    active = get_active(model)
    enabled = is_enabled(model)
    put_away(model)
    vars(model).pop(_STATE, None)
    try:
        yield
    finally:
        if get_graft(model) is not None:
            uninstall(model)
        record_grafts(model, grafts, ())
        activate(model, active, enabled=enabled)


@contextlib.contextmanager
def with_only(model: ModelMixin, name: str) -> Iterator[None]:
    """Run one graft by itself inside, the others again afterwards."""
    active = get_active(model)
    enabled = is_enabled(model)
    activate(model, name)
    try:
        yield
    finally:
        activate(model, active, enabled=enabled)


def add(model: ModelMixin, name: str, graft: Graft) -> None:
    """Run a graft that was built beside the model with those that run; where they are disabled, it is too."""
    grafts = get_grafts(model)
    active = get_active(model)
    enabled = is_enabled(model) or not active
    _require_disjoint({**{other: grafts[other] for other in active}, name: graft})
    put_away(model)
    record_grafts(model, {**grafts, name: graft}, ())
    activate(model, [*active, name], enabled=enabled)


def _require_name(name: str, grafts: dict[str, Graft]) -> None:
    if name not in grafts:
        raise UnknownNameError("graft of this model", name, grafts)


def _require_disjoint(grafts: dict[str, Graft]) -> None:
    """Raise `StateError` for grafts that cannot run together."""
    owners: dict[str, str] = {}
    for name, graft in grafts.items():
        for path in graft.seats:
            if path in owners:
                raise StateError(
                    f"The grafts {owners[path]!r} and {name!r} both replace {path}. Activate one of them, or put all "
                    "rules into one plan."
                )
            owners[path] = name
    for path, name in owners.items():
        inside = _first_of_another(owners, name, lambda other, path=path: other.startswith(f"{path}."))
        if inside is not None:
            raise StateError(
                f"The graft {name!r} replaces {path}, and {owners[inside]!r} replaces {inside} in it. Put all rules "
                "into one plan, or activate one of them."
            )
    for name, graft in grafts.items():
        for trained in (*graft.body, *graft.adapters):
            path = _first_of_another(owners, name, lambda path, trained=trained: f"{trained}.".startswith(f"{path}."))
            if path is not None:
                raise StateError(
                    f"The graft {name!r} trained {trained}, which {owners[path]!r} replaces. Activate one."
                )
    # There is one base and one set of LoRA layers to train.
    _require_one("trained weights of the rest of the model", [name for name, graft in grafts.items() if graft.body])
    _require_one("LoRA layers", [name for name, graft in grafts.items() if graft.adapter_config is not None])


def _first_of_another(owners: dict[str, str], name: str, matches) -> str | None:
    """Return the first path that matches and belongs to another graft."""
    return next((path for path, owner in owners.items() if owner != name and matches(path)), None)


def _require_one(what: str, names: list[str]) -> None:
    if len(names) > 1:
        raise StateError(
            f"The grafts {' and '.join(map(repr, names))} carry {what} each. Activate one of them at a time."
        )


def _join(grafts: list[Graft]) -> Graft:
    """Make one graft of all their parts, in forward order; one alone is itself."""
    if len(grafts) == 1:
        return grafts[0]
    order = {site.path: place for place, site in enumerate(grafts[0].sites)}
    edits = [edit for graft in grafts for edit in graft.plan.edits]
    edits.sort(key=lambda edit: order[edit.site.path])
    joined = {}
    for entry in dataclasses.fields(Graft):
        values = [getattr(graft, entry.name) for graft in grafts]
        if isinstance(values[0], dict):
            joined[entry.name] = {key: value for each in values for key, value in each.items()}
        elif isinstance(values[0], list):
            joined[entry.name] = [row for each in values for row in each]
    # At most one has a config: `_require_disjoint` refuses more.
    configs = [graft.adapter_config for graft in grafts if graft.adapter_config is not None]
    return dataclasses.replace(
        grafts[0],
        **joined,
        plan=GraftPlan(grafts[0].plan.model_class, tuple(edits)),
        # Their own slots stay as they are, for when they run alone.
        slot=ContextSlot(),
        adapter_config=next(iter(configs), None),
    )


def _split(joined: Graft, members: list[Graft]) -> None:
    """Give each member back what the joined graft held; what training added to it goes to the first."""
    first = members[0]
    for kind in ("body", "adapters"):
        owners = {name: graft for graft in members for name in getattr(graft, kind)}
        for name, value in getattr(joined, kind).items():
            owner = owners.get(name, first)
            getattr(owner, kind)[name] = value
    if joined.adapter_config is not None and all(graft.adapter_config is None for graft in members):
        first.adapter_config = joined.adapter_config
    # Its history began as theirs in a row; what follows was done to all of them together.
    known = sum(len(graft.history) for graft in members)
    first.history.extend(joined.history[known:])
    for graft in members:
        bind_contexts(graft)
