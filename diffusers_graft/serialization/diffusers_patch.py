"""diffusers' saving, pushing and loading, extended to grafted models; without a graft they do what they did."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from ..core.post_import import when_imported
from ..core.storage import require_regular
from ..errors import StateError, UnknownNameError
from ..injection.graft import get_graft, is_enabled
from ..injection.hooks import without_group_offloading
from .config_file import descriptions_in
from .describe import LOADED_FROM, LoadedFrom
from .load_model import load_pretrained
from .remote_code.pack import CODE
from .remote_code.unpack import FETCHING, loading_arguments
from .save_model import forget_description, is_described, require_no_variants, save_grafted, save_plain
from .sparse_checkpoints import GATE, holds_gates
from .upload import download_config, push_model

logger = logging.getLogger(__name__)

_PUSHING = ("private", "token", "commit_message", "create_pr")
# model_index.json names this library, since stock diffusers would read grafts as if they were none.
_LIBRARY = __name__.partition(".")[0]
# A grafted model that is read at all has none of these.
_MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def attach_saving() -> None:
    """Extend the methods of `ModelMixin` and `DiffusionPipeline` that save, push and load."""
    ModelMixin.save_pretrained = _saving(ModelMixin.save_pretrained)
    ModelMixin.push_to_hub = _pushing(ModelMixin.push_to_hub)
    loading = classmethod(_loading(ModelMixin.from_pretrained.__func__))
    ModelMixin.from_pretrained = loading  # pyright: ignore[reportAttributeAccessIssue]  # set unbound, read bound
    # Pipelines are imported by those who use them: they bring transformers and peft.
    when_imported("diffusers.pipelines.pipeline_utils", _attach_to_pipelines)


def _attach_to_pipelines() -> None:
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    DiffusionPipeline.save_pretrained = _saving_pipeline(DiffusionPipeline.save_pretrained)
    LOADABLE_CLASSES[_LIBRARY] = {}


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    names = _arguments(original)

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        graft = get_graft(self)
        folder = Path(save_directory)
        forget_description(self)
        kwargs |= dict(zip(names, args, strict=False))
        if graft is None or not is_enabled(self):
            return _save_without_graft(original, self, folder, kwargs)
        known = [*names, *_PUSHING, "repo_id", "self_contained"]
        unknown = sorted(kwargs.keys() - set(known))
        if unknown:  # which diffusers would ignore
            raise UnknownNameError("argument of saving a grafted model", unknown[0], known)
        if not kwargs.pop("is_main_process", True):
            return None
        pushing = {name: kwargs.pop(name) for name in _PUSHING if name in kwargs}
        repo_id = kwargs.pop("repo_id", folder.name)
        push_to_hub = kwargs.pop("push_to_hub", False)
        with without_group_offloading(self, from_disk_only=True):
            save_grafted(original, self, graft, folder, **kwargs)
        if not push_to_hub:
            return None
        return push_model(folder, repo_id, variant=kwargs.get("variant"), **pushing)

    return save_pretrained


def _save_without_graft(original: Callable[..., Any], model: ModelMixin, folder: Path, kwargs: dict[str, Any]) -> Any:
    if kwargs.pop("self_contained", False):
        raise StateError("Only a grafted model has code to bring along. Graft it, or leave self_contained out.")
    require_no_variants(folder, kwargs.get("variant"))
    if kwargs.get("push_to_hub"):
        # diffusers would name it after the folder it writes to, which may be a temporary one.
        kwargs["repo_id"] = kwargs.get("repo_id") or folder.name
        _require_no_variants_there(kwargs["repo_id"], kwargs)
    if not kwargs.get("is_main_process", True):
        return original(model, folder, **kwargs)
    return save_plain(original, model, folder, **kwargs)


def _require_no_variants_there(repo_id: str, given: dict[str, Any]) -> None:
    """Raise `StateError` as `require_no_variants`, of a repository."""
    with tempfile.TemporaryDirectory() as folder:
        download_config(repo_id, folder, given.get("token"))
        require_no_variants(Path(folder), given.get("variant"), where=repo_id)


def _arguments(method: Callable[..., Any]) -> list[str]:
    """Return the arguments of a method of diffusers after the model and its destination, in order."""
    parameters = inspect.signature(method).parameters
    return [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD][2:]


def _saving_pipeline(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, self_contained: bool = False, **kwargs):
        # A compiled component is a wrapper around the model.
        parts = {name: getattr(part, "_orig_mod", part) for name, part in self.components.items()}
        grafted = {name: part for name, part in parts.items() if isinstance(part, ModelMixin) and is_enabled(part)}
        if self_contained and not grafted:
            raise StateError(
                "Only a pipeline that has a grafted model has code to bring along. Leave self_contained out."
            )
        # The index is written from the pipeline's configuration, which is put back afterwards.
        config = self._internal_dict
        named = {name: (_LIBRARY, type(part).__name__) for name, part in grafted.items()}
        if self_contained:
            named = dict.fromkeys(grafted, CODE)
        self.register_to_config(**named)
        try:
            if self_contained:
                for part in grafted.values():
                    vars(part)["save_pretrained"] = functools.partial(part.save_pretrained, self_contained=True)
            return original(self, save_directory, *args, **kwargs)
        finally:
            self._internal_dict = config
            for part in grafted.values():
                vars(part).pop("save_pretrained", None)

    return save_pretrained


def _pushing(original: Callable[..., Any]) -> Callable[..., Any]:
    names = _arguments(original)

    @functools.wraps(original)
    def push_to_hub(self, repo_id, *args, **kwargs):
        graft = get_graft(self)
        kwargs |= dict(zip(names, args, strict=False))
        if kwargs.get("subfolder"):
            return original(self, repo_id, **kwargs)
        if graft is None or not is_enabled(self):
            _require_no_variants_there(repo_id, kwargs)
            return original(self, repo_id, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            # The other variants of the repository stay described.
            download_config(repo_id, folder, kwargs.get("token"))
            kwargs.pop("subfolder", None)
            pushing = {name: kwargs.pop(name) for name in _PUSHING if name in kwargs}
            self.save_pretrained(folder, **kwargs)
            return push_model(Path(folder), repo_id, variant=kwargs.get("variant"), **pushing)

    return push_to_hub


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        source = pretrained_model_name_or_path
        if not _is_grafted(cls, source, kwargs):
            loaded, misfits = original(cls, source, **{**kwargs, "output_loading_info": True})
            if holds_gates(misfits.get("unexpected_keys") or ()):
                _warn_of_gates(str(source))
            _note_source(loaded, source, kwargs.get("subfolder"))
            if kwargs.get("output_loading_info"):
                return loaded, misfits
            return loaded
        model = load_pretrained(source, **loading_arguments(kwargs))
        if kwargs.get("output_loading_info"):
            return model, {name: [] for name in _MISFITS}
        return model

    return from_pretrained


def _warn_of_gates(source: str) -> None:
    """Say what diffusers leaves out of a checkpoint with Video Sparse Attention."""
    logger.warning(
        "The attention of %s has layers that diffusers drops (%s, of Video Sparse Attention): this model runs without "
        "them. Load it with dg.import_sparse, which keeps them.",
        source,
        GATE,
    )


def _note_source(loaded: Any, source: Any, subfolder: Any) -> None:
    """Note on a model where it was loaded from: its configuration holds a path that may be relative, no subfolder."""
    if not isinstance(source, str | os.PathLike):
        return
    folder = None
    if os.path.isdir(source):
        folder = os.path.abspath(source)
    vars(loaded)[LOADED_FROM] = LoadedFrom(str(source), folder, subfolder or None)


def _is_grafted(cls: Any, source: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether the `config.json` that is asked for describes a grafted model of the variant asked for."""
    folder = Path(source or "") / (kwargs.get("subfolder") or "")
    if folder.is_dir():
        # diffusers would wait for a pipe, and read a device without end.
        if (folder / "config.json").exists():
            require_regular(folder / "config.json")
        return is_described(folder, kwargs.get("variant"))
    try:
        config = cls.load_config(source, **{name: kwargs[name] for name in FETCHING if name in kwargs})
        return (kwargs.get("variant") or "") in descriptions_in(config)
    except (OSError, ValueError):
        return False  # diffusers explains it better
