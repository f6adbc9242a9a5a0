"""What `import diffusers_graft` gives every diffusers model: the verbs, as methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diffusers import ModelMixin

from .errors import StateError
from .injection import named_grafts as named
from .injection.graft import Graft, build_graft, get_graft
from .injection.install import disable, enable, install, require_graft
from .injection.lora_verbs import attach_lora_verbs
from .inspection import require_model
from .planning.plan import GraftPlan, plan_graft
from .serialization import graft_folder as store
from .serialization.diffusers_patch import attach_saving
from .serialization.download import require_source


def set_graft(
    model: ModelMixin, graft, *, revision: str | None = None, seed: int = 0, graft_name: str | None = None, **loading
) -> Graft:
    """Graft a model in place.

    Args:
        graft: rules (a dict or their text form), a `GraftPlan`, a built `Graft`, a folder that `save_graft` wrote, or
            a Hub repository id.
        revision: branch, tag or commit of a Hub repository.
        seed: of random starts, where the parts are built here.
        graft_name: for several grafts on one model, on disjoint sites; a graft without a name wants the model for
            itself. Where the others are disabled, it is too, until `enable_graft`.
        loading: of a folder or repository, as for `load_graft`.

    Raises:
        GraftError: one of its kinds, for anything that cannot be installed; the model is then as it was.
    """
    require_model(model)
    if graft_name is not None and not (isinstance(graft_name, str) and graft_name):
        raise StateError(f"A graft_name is a text of one letter or more; got {graft_name!r}.")
    there = named.held(model)
    if not there:
        graft = _set_alone(model, graft, revision, seed, loading)
        named.remember(model, {graft_name or named.DEFAULT: graft}, (graft_name or named.DEFAULT,))
        return graft
    if graft_name is None and get_graft(model) is None:
        raise StateError(
            f"Grafts named {', '.join(map(repr, there))} wait here: give this one a graft_name, or unset them."
        )
    if graft_name is None:
        return _set_alone(model, graft, revision, seed, loading)
    if graft_name in there:
        raise StateError(
            f"This model has a graft {graft_name!r} already. Choose another name, or unset_graft({graft_name!r})."
        )
    if any(one.is_standalone for one in there.values()):
        raise StateError(
            "This model was loaded whole, without the base that another graft needs. Load the base model."
        )
    with named.without_grafts(model):
        graft = _set_alone(model, graft, revision, seed, loading)
    named.add(model, graft_name, graft)
    return graft


def _set_alone(model: ModelMixin, graft, revision: str | None, seed: int, loading: dict) -> Graft:
    if isinstance(graft, str | Path) and not _is_rules(graft):
        return store.load_graft(model, graft, revision=revision, **loading)
    if given := sorted({**loading, **({"revision": revision} if revision else {})}):
        raise StateError(
            f"set_graft takes {', '.join(given)} for a folder or a Hub repository at most; this graft is built here. "
            "Leave them out."
        )
    if not isinstance(graft, Graft):
        plan = graft if isinstance(graft, GraftPlan) else plan_graft(model, graft)
        graft = build_graft(model, plan, seed=seed)
    named.bind(graft)
    install(model, graft)
    return graft


def _is_rules(text: str | Path) -> bool:
    """A folder is one, whatever its name looks like."""
    return isinstance(text, str) and "[" in text and not os.path.isdir(text)  # noqa: PTH112 - a text may be too long for a path


def load_graft(model: ModelMixin, source: str | Path, **loading) -> Graft:
    """Install a saved graft in the model it was made for; its outputs are those that were saved, bit for bit.

    Args:
        source: a folder that `save_graft` wrote, or a Hub repository id.
        loading: `graft_name`, as for `set_graft`, and the arguments of
            `diffusers_graft.serialization.graft_folder.load_graft`.
    """
    require_model(model)
    require_source(source)  # set_graft would take rules, too; a text that looks like some is a name here all the same
    return set_graft(model, Path(source) if _is_rules(source) or Path(source).is_dir() else source, **loading)


def save_graft(model: ModelMixin, folder: str | Path, *, graft_name: str | None = None, **settings) -> None:
    """Write a model's graft, its proof and a card to a folder; a graft saved there before is replaced whole.

    Args:
        graft_name: which one, where the model has several.
        settings: those of `diffusers_graft.serialization.graft_folder.save_graft`: `scores`, `about`, `variant` and
            more.
    """
    there = named.held(model)
    if graft_name is None and len(there) < 2:
        return store.save_graft(model, folder, **settings)
    if graft_name is None:
        raise StateError(f"This model has several grafts: say graft_name=, one of {', '.join(map(repr, there))}.")
    with named.alone(model, graft_name):
        return store.save_graft(model, folder, **settings)


def _graft(model: ModelMixin) -> Graft | None:
    """The installed graft, or None; of several that run, one graft made of all their parts."""
    return get_graft(model)


def _unset_graft(model: ModelMixin, graft_name: str | None = None) -> Graft:
    """Back to the original model, bit for bit, or to it without one graft; returns the graft, which `set_graft` takes
    again.
    """
    if not named.held(model):
        require_graft(model)
    return named.forget(model, graft_name)


def _set_active_graft(model: ModelMixin, graft_name: str | Sequence[str]) -> None:
    """Run the grafts of these names and no others; the others wait."""
    named.activate(model, graft_name)


def _active_grafts(model: ModelMixin) -> list[str]:
    """Names of the grafts that run."""
    return list(named.active(model))


def attach_verbs() -> None:
    """Give `ModelMixin` the verbs. Called once, by `import diffusers_graft`."""
    ModelMixin.set_graft = set_graft
    ModelMixin.graft = property(_graft)
    ModelMixin.unset_graft, ModelMixin.disable_graft, ModelMixin.enable_graft = _unset_graft, disable, enable
    ModelMixin.set_active_graft, ModelMixin.active_grafts = _set_active_graft, _active_grafts
    ModelMixin.save_graft, ModelMixin.load_graft = save_graft, load_graft
    attach_lora_verbs()
    attach_saving()
