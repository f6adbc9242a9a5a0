"""What `import diffusers_graft` gives every diffusers model: the verbs, as methods."""
from __future__ import annotations

from pathlib import Path

from diffusers import ModelMixin

from .anatomy import require_model
from .graft import Graft, build_graft, installed
from .hub.diffusers_verbs import attach_saving
from .hub.store import load_graft, save_graft
from .plan import GraftPlan, plan_graft
from .surgery import disable, enable, install, uninstall


def set_graft(model: ModelMixin, graft, *, revision: str | None = None, seed: int = 0, **loading) -> Graft:
    """Graft a model in place.

    Args:
        graft: rules (a dict or their text form), a `GraftPlan`, a built `Graft`, a folder that `save_graft` wrote, or a
            Hub repository id.
        revision: branch, tag or commit of a Hub repository.
        seed: of random starts, where the parts are built here.
        loading: of a folder or repository, as for `load_graft`.

    Raises:
        GraftError: one of its kinds, for anything that cannot be installed; the model is then as it was.
    """
    require_model(model)
    if isinstance(graft, str | Path) and not _is_rules(graft):
        return load_graft(model, graft, revision=revision, **loading)
    if not isinstance(graft, Graft):
        plan = graft if isinstance(graft, GraftPlan) else plan_graft(model, graft)
        graft = build_graft(model, plan, seed=seed)
    install(model, graft)
    return graft


def _is_rules(text: str | Path) -> bool:
    return isinstance(text, str) and "[" in text


def _graft(model: ModelMixin) -> Graft | None:
    """The installed graft, or None."""
    return installed(model)


def _unset_graft(model: ModelMixin) -> Graft:
    """Back to the original model, bit for bit; returns the graft, which `set_graft` takes again."""
    return uninstall(model)


def _disable_graft(model: ModelMixin) -> None:
    """Run the original parts; the graft stays at hand."""
    disable(model)


def _enable_graft(model: ModelMixin) -> None:
    """Run the grafted parts again."""
    enable(model)


def attach_verbs() -> None:
    """Give `ModelMixin` the verbs. Called once, by `import diffusers_graft`."""
    ModelMixin.set_graft = set_graft
    ModelMixin.graft = property(_graft)
    ModelMixin.unset_graft, ModelMixin.disable_graft, ModelMixin.enable_graft = _unset_graft, _disable_graft, _enable_graft
    ModelMixin.save_graft, ModelMixin.load_graft = save_graft, load_graft
    attach_saving()
