"""diffusers' own verbs, taught about grafts: without one they are what they were."""
from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from ..errors import StateError
from ..graft import installed, is_enabled
from .description import CONFIG
from .folders import settle
from .full import MARK, load_pretrained, save_whole
from .push import push_folder

_PUSHING = ("private", "token", "commit_message", "create_pr")
_FETCHING = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")
_LOADING = ("dtype", "torch_dtype", "variant", "low_cpu_mem_usage")


def attach_saving() -> None:
    """Teach `ModelMixin` to save, push and load grafted models."""
    ModelMixin.save_pretrained = _saving(ModelMixin.save_pretrained)
    ModelMixin.push_to_hub = _pushing(ModelMixin.push_to_hub)
    ModelMixin.from_pretrained = classmethod(_loading(ModelMixin.from_pretrained.__func__))


def _saving(original):
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs):
        graft = installed(self)
        if graft is None or not is_enabled(self):
            return original(self, save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        folder, pushing = Path(save_directory), {name: kwargs.pop(name) for name in _PUSHING if name in kwargs}
        repo_id = kwargs.pop("repo_id", folder.name)
        save_whole(original, self, graft, folder, *args, **kwargs)
        return push_folder(folder, repo_id, **pushing) if push_to_hub else None

    return save_pretrained


def _pushing(original):
    @functools.wraps(original)
    def push_to_hub(self, repo_id, *args, **kwargs):
        graft = installed(self)
        if graft is None or not is_enabled(self) or args or kwargs.get("subfolder"):
            return original(self, repo_id, *args, **kwargs)
        pushing = {name: kwargs.pop(name) for name in _PUSHING if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return push_folder(Path(folder), repo_id, **pushing)

    return push_to_hub


def _loading(original):
    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        if not _is_grafted(cls, pretrained_model_name_or_path, kwargs):
            return original(cls, pretrained_model_name_or_path, **kwargs)
        if kwargs.get("quantization_config") is not None or isinstance(kwargs.get("device_map"), dict):
            raise StateError(
                "A grafted model is loaded without quantization, onto one device. Load the base as you like, then load_graft."
            )
        known = {name: kwargs[name] for name in (*_FETCHING, *_LOADING) if kwargs.get(name) is not None}
        return load_pretrained(pretrained_model_name_or_path, device=kwargs.get("device_map"), **known)

    return from_pretrained


def _is_grafted(cls: type[ModelMixin], source: Any, kwargs: dict[str, Any]) -> bool:
    """Whether there is a whole grafted model: by its files in a folder, by the mark in its configuration on the Hub."""
    folder = Path(source or "") / (kwargs.get("subfolder") or "")
    if folder.is_dir():
        settle(folder)
        if (folder / CONFIG).is_file():
            return (folder / "config.json").is_file()
    try:
        return MARK in cls.load_config(source, **{name: kwargs[name] for name in _FETCHING if name in kwargs})
    except (OSError, ValueError):
        return False  # diffusers says it better
