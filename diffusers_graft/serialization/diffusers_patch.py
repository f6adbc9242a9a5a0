"""diffusers' own verbs, taught about grafts: without one they are what they were."""

from __future__ import annotations

import functools
import inspect
import tempfile
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from ..errors import StateError, UnknownNameError
from ..injection.graft import get_graft, is_enabled
from .atomic_folder import settle
from .config_file import described
from .load_model import FETCHING, load_as_diffusers
from .remote_code.pack import CODE
from .save_model import forget_description, require_alone, save_whole
from .upload import download_config, push_model

_PUSHING = ("private", "token", "commit_message", "create_pr")
_LIBRARY = __name__.partition(".")[
    0
]  # which `model_index.json` names: stock diffusers would read grafts as if they were none
_MISFITS = (
    "missing_keys",
    "unexpected_keys",
    "mismatched_keys",
    "error_msgs",
)  # which a model that is read at all has none of


def attach_saving() -> None:
    """Teach `ModelMixin` to save, push and load grafted models."""
    ModelMixin.save_pretrained = _saving(ModelMixin.save_pretrained)
    ModelMixin.push_to_hub = _pushing(ModelMixin.push_to_hub)
    ModelMixin.from_pretrained = classmethod(_loading(ModelMixin.from_pretrained.__func__))
    DiffusionPipeline.save_pretrained = _saving_all(DiffusionPipeline.save_pretrained)
    LOADABLE_CLASSES[_LIBRARY] = {}


def _saving(original):
    names = _arguments(original)

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        graft = get_graft(self)
        forget_description(self)
        if graft is None or not is_enabled(self):
            if kwargs.pop("self_contained", False):
                raise StateError(
                    "Only a grafted model has code to bring along. Graft it, or leave self_contained out."
                )
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            require_alone(Path(save_directory), given.get("variant"))
            if given.get("push_to_hub"):
                _require_alone_there(given.get("repo_id") or Path(save_directory).name, given)
            return original(self, save_directory, *args, **kwargs)
        kwargs |= dict(zip(names, args, strict=False))
        known = [*names, *_PUSHING, "repo_id", "self_contained"]
        if unknown := sorted(kwargs.keys() - set(known)):  # which diffusers would pass over
            raise UnknownNameError("argument of saving a grafted model", unknown[0], known)
        if not kwargs.pop("is_main_process", True):
            return None
        folder, pushing = Path(save_directory), {name: kwargs.pop(name) for name in _PUSHING if name in kwargs}
        repo_id, push_to_hub = kwargs.pop("repo_id", folder.name), kwargs.pop("push_to_hub", False)
        save_whole(original, self, graft, folder, **kwargs)
        return push_model(folder, repo_id, variant=kwargs.get("variant"), **pushing) if push_to_hub else None

    return save_pretrained


def _require_alone_there(repo_id: str, given: dict[str, Any]) -> None:
    """`require_alone`, of a repository."""
    with tempfile.TemporaryDirectory() as folder:
        download_config(repo_id, folder, given.get("token"))
        require_alone(Path(folder), given.get("variant"), where=repo_id)


def _arguments(verb) -> list[str]:
    """What a verb of diffusers takes behind the model and where it goes, in order."""
    return [name for name, one in inspect.signature(verb).parameters.items() if one.kind is not one.VAR_KEYWORD][2:]


def _saving_all(original):
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, self_contained: bool = False, **kwargs):
        parts = {
            name: getattr(part, "_orig_mod", part) for name, part in self.components.items()
        }  # compiled ones are wrapped
        grafted = {name: part for name, part in parts.items() if isinstance(part, ModelMixin) and is_enabled(part)}
        if self_contained and not grafted:
            raise StateError(
                "Only a pipeline that has a grafted model has code to bring along. Leave self_contained out."
            )
        config = self._internal_dict
        self.register_to_config(
            **{name: CODE if self_contained else (_LIBRARY, type(part).__name__) for name, part in grafted.items()}
        )
        try:
            for part in grafted.values() if self_contained else ():
                vars(part)["save_pretrained"] = functools.partial(part.save_pretrained, self_contained=True)
            return original(self, save_directory, *args, **kwargs)
        finally:
            self._internal_dict = config
            for part in grafted.values():
                vars(part).pop("save_pretrained", None)

    return save_pretrained


def _pushing(original):
    names = _arguments(original)

    @functools.wraps(original)
    def push_to_hub(self, repo_id, *args, **kwargs):
        graft = get_graft(self)
        kwargs |= dict(zip(names, args, strict=False))
        if kwargs.get("subfolder"):
            return original(self, repo_id, **kwargs)
        if graft is None or not is_enabled(self):
            _require_alone_there(repo_id, kwargs)
            return original(self, repo_id, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            download_config(repo_id, folder, kwargs.get("token"))
            kwargs.pop("subfolder", None)
            pushing = {name: kwargs.pop(name) for name in _PUSHING if name in kwargs}
            self.save_pretrained(folder, **kwargs)
            return push_model(Path(folder), repo_id, variant=kwargs.get("variant"), **pushing)

    return push_to_hub


def _loading(original):
    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        if not _is_grafted(cls, pretrained_model_name_or_path, kwargs):
            return original(cls, pretrained_model_name_or_path, **kwargs)
        model = load_as_diffusers(pretrained_model_name_or_path, kwargs)
        return (model, {name: [] for name in _MISFITS}) if kwargs.get("output_loading_info") else model

    return from_pretrained


def _is_grafted(cls: type[ModelMixin], source: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the weights that are asked for are those of a grafted model: `config.json` says so, and nothing else
    does.
    """
    folder = Path(source or "") / (kwargs.get("subfolder") or "")
    if folder.is_dir():
        settle(folder)
    try:
        config = cls.load_config(source, **{name: kwargs[name] for name in FETCHING if name in kwargs})
        return (kwargs.get("variant") or "") in described(config)
    except (OSError, ValueError):
        return False  # diffusers says it better
