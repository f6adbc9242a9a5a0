"""The methods that `import diffusers_graft` gives every diffusers model, and the protocol that names them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from diffusers import ModelMixin

from .errors import StateError
from .injection import named_grafts
from .injection.graft import Graft, build_graft, get_graft
from .injection.hooks import without_group_offloading
from .injection.install import disable, enable, install, require_graft
from .injection.lora_verbs import attach_lora_verbs
from .inspection import require_model
from .planning.plan import GraftPlan, plan_graft
from .planning.rules import Rules
from .serialization import graft_folder
from .serialization.diffusers_patch import attach_saving
from .serialization.download import require_source


class GraftableModel(Protocol):
    """A diffusers model with the methods that `import diffusers_graft` adds, for editors and type checkers.

    `model: dg.GraftableModel = DiTTransformer2DModel.from_pretrained(...)` makes them known by name and signature.
    """

    @property
    def graft(self) -> Graft | None:
        """The installed graft, or None; of several that run, one graft made of all their parts."""
        ...

    def set_graft(
        self,
        graft: Rules | GraftPlan | Graft | Path,
        *,
        revision: str | None = None,
        seed: int = 0,
        graft_name: str | None = None,
        **loading: Any,
    ) -> Graft:
        """Graft the model in place, by rules, a plan, a built graft, a folder or a Hub repository."""
        ...

    def unset_graft(self, graft_name: str | None = None) -> Graft:
        """Make the model the original again, bit for bit."""
        ...

    def disable_graft(self) -> None:
        """Run the original parts; the graft is kept."""

    def enable_graft(self) -> None:
        """Run the grafted parts."""

    def set_active_graft(self, graft_name: str | Sequence[str]) -> None:
        """Run the grafts of these names and no others."""

    def active_grafts(self) -> list[str]:
        """Return the names of the grafts that run."""
        ...

    def save_graft(self, folder: str | Path, *, graft_name: str | None = None, **settings: Any) -> None:
        """Write the graft, its proof and a card to a folder."""

    def load_graft(self, source: str | Path, **loading: Any) -> Graft:
        """Install a saved graft."""
        ...


def set_graft(
    model: ModelMixin,
    graft: Rules | GraftPlan | Graft | Path,
    *,
    revision: str | None = None,
    seed: int = 0,
    graft_name: str | None = None,
    **loading: Any,
) -> Graft:
    """Graft a model in place.

    Args:
        model: any diffusers model.
        graft: rules (a dict or their text form), a `GraftPlan`, a built `Graft`, a folder that `save_graft` wrote, or
            a Hub repository id.
        revision: branch, tag or commit of a Hub repository.
        seed: of random starts, where the parts are built here.
        graft_name: needed for several grafts on one model, which must be on disjoint sites. Where the others are
            disabled, this one is too, until `enable_graft`.
        loading: arguments of `load_graft`, for a folder or a repository.

    Returns:
        The graft that is installed.

    Raises:
        GraftError: one of its kinds, for anything that cannot be installed; the model is then as it was.
    """
    # Everything is checked before anything is touched.
    require_model(model)
    if graft_name is not None and not (isinstance(graft_name, str) and graft_name):
        raise StateError(f"A graft_name is a text of one letter or more; got {graft_name!r}.")
    present = named_grafts.get_grafts(model)
    if not present:
        graft = _set_alone(model, graft, revision, seed, loading)
        name = graft_name or named_grafts.DEFAULT
        named_grafts.record_grafts(model, {name: graft}, (name,))
        return graft
    if graft_name is None:
        if get_graft(model) is None:
            raise StateError(
                f"Grafts named {', '.join(map(repr, present))} wait here: give this one a graft_name, or unset them."
            )
        return _set_alone(model, graft, revision, seed, loading)
    if graft_name in present:
        raise StateError(
            f"This model has a graft {graft_name!r} already. Choose another name, or unset_graft({graft_name!r})."
        )
    if any(one.is_standalone for one in present.values()):
        raise StateError(
            "This model was loaded with its graft, without the base that another graft needs. Load the base model."
        )
    # Built from the originals, not from what other grafts made of them.
    with named_grafts.without_grafts(model):
        graft = _set_alone(model, graft, revision, seed, loading)
    named_grafts.add(model, graft_name, graft)
    return graft


def _set_alone(model: ModelMixin, graft: Any, revision: str | None, seed: int, loading: dict[str, Any]) -> Graft:
    """Install a graft on a model that has none."""
    source: Any = graft
    if isinstance(source, str | Path) and not _is_rules(source):
        return graft_folder.load_graft(model, source, revision=revision, **loading)
    unused = sorted(loading)
    if revision is not None:
        unused.append("revision")
    if unused:
        raise StateError(
            f"set_graft takes {', '.join(unused)} for a folder or a Hub repository at most; this graft is built here. "
            "Leave them out."
        )
    if not isinstance(graft, Graft):
        # Anything else is for the rules' reader to refuse in words.
        plan = graft if isinstance(graft, GraftPlan) else plan_graft(model, graft)
        graft = build_graft(model, plan, seed=seed)
    # It may have run as part of several, whose slot its operators read then.
    named_grafts.bind_contexts(graft)
    install(model, graft)
    return graft


def _is_rules(text: str | Path) -> bool:
    """Return whether a text is rules in their text form. A folder is none, whatever its name."""
    return isinstance(text, str) and "[" in text and not os.path.isdir(text)  # noqa: PTH112 - a text may be too long for a path


def load_graft(model: ModelMixin, source: str | Path, **loading: Any) -> Graft:
    """Install a saved graft in the model it was made for; its outputs are those that were saved, bit for bit.

    Args:
        model: the base of the graft.
        source: a folder that `save_graft` wrote, or a Hub repository id.
        loading: `graft_name`, as for `set_graft`, and the arguments of
            `diffusers_graft.serialization.graft_folder.load_graft`.
    """
    require_model(model)
    require_source(source)
    # As a path, so that set_graft does not take the name for rules.
    is_path = _is_rules(source) or Path(source).is_dir()
    return set_graft(model, Path(source) if is_path else source, **loading)


def save_graft(model: ModelMixin, folder: str | Path, *, graft_name: str | None = None, **settings: Any) -> None:
    """Write a model's graft, its proof and a card to a folder; a graft saved there before is replaced.

    Args:
        model: a grafted model.
        folder: created if it does not exist.
        graft_name: which graft, where the model has several.
        settings: those of `diffusers_graft.serialization.graft_folder.save_graft`: `scores`, `about`, `variant` and
            more.
    """
    present = named_grafts.get_grafts(model)
    with without_group_offloading(model, from_disk_only=True):
        if graft_name is not None:
            with named_grafts.with_only(model, graft_name):
                graft_folder.save_graft(model, folder, **settings)
        elif len(present) > 1:
            names = ", ".join(map(repr, present))
            raise StateError(f"This model has several grafts: say graft_name=, one of {names}.")
        else:
            graft_folder.save_graft(model, folder, **settings)


def _graft(model: ModelMixin) -> Graft | None:
    """Return the installed graft, or None; of several that run, one graft made of all their parts."""
    return get_graft(model)


def _unset_graft(model: ModelMixin, graft_name: str | None = None) -> Graft:
    """Make the model the original again, bit for bit, or only without one of its grafts.

    Returns the graft, which `set_graft` takes again.
    """
    if not named_grafts.get_grafts(model):
        require_graft(model)
    return named_grafts.remove(model, graft_name)


def _set_active_graft(model: ModelMixin, graft_name: str | Sequence[str]) -> None:
    """Run the grafts of these names and no others; the others wait."""
    named_grafts.activate(model, graft_name)


def _active_grafts(model: ModelMixin) -> list[str]:
    """Return the names of the grafts that run."""
    return list(named_grafts.get_active(model))


_METHODS = {
    "set_graft": set_graft,
    "graft": property(_graft),
    "unset_graft": _unset_graft,
    "disable_graft": disable,
    "enable_graft": enable,
    "set_active_graft": _set_active_graft,
    "active_grafts": _active_grafts,
    "save_graft": save_graft,
    "load_graft": load_graft,
}


def attach_verbs() -> None:
    """Give `ModelMixin` the methods. Called once, by `import diffusers_graft`."""
    # On the class that all of diffusers' models have in common: many lack the mixins for attention and LoRA.
    for name, method in _METHODS.items():
        setattr(ModelMixin, name, method)
    attach_lora_verbs()
    attach_saving()
