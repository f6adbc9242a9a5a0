"""Operators in files of one's own: read for `check`, and begun by `new-operator`."""

from __future__ import annotations

import importlib.util
import keyword
from pathlib import Path

from ..core.storage import read_text, write_text
from ..errors import FileError, OperatorError
from ..operators import Operator, available

_MIXER = '''"""What {name} does, in one sentence. Paper: title, arXiv id, equation."""

from dataclasses import dataclass

import torch
from torch import nn

from diffusers_graft.errors import OperatorError
from diffusers_graft.operators import Mixer


class {cls}(Mixer):
    """Every token takes in a share of the mean of all values: replace this by what tokens shall see of each other."""

    unused_inputs = ("input 0", "input 1")  # queries and keys are not read
    paper = ""
    start = "projections keep their pretrained weights; shares are `share`"

    @dataclass(frozen=True, kw_only=True)
    class Config(Mixer.Config):
        """Settings, never sizes of a model: those come from the site."""

        share: float = 0.5

        def __post_init__(self):
            super().__post_init__()
            if not 0 <= self.share <= 1:
                raise OperatorError(f"{name}: share lies from 0 to 1; got {{self.share!r}}.")

    def __init__(self, config, site):
        super().__init__(config, site)
        self.share = nn.Parameter(torch.rand(site.head_width))  # stays so with init="random"

    @torch.no_grad()
    def init_from(self, original):
        self.share.fill_(self.config.share)

    def forward(self, query, key, value, context):  # [B, H, N, E] -> [B, H, N, E]
        return torch.lerp(value, value.mean(2, keepdim=True).expand_as(value), self.share)

    def flops(self, tokens):
        return 0  # as torch's counter: products of matrices, and convolutions
'''

_FEED_FORWARD = '''"""What {name} does, in one sentence. Paper: title, arXiv id, equation."""

from torch import nn

from diffusers_graft.operators import FeedForwardOperator


class {cls}(FeedForwardOperator):
    """One linear map of every token: replace this by what a token shall become."""

    paper = ""
    start = "random"

    def __init__(self, config, site):
        super().__init__(config, site)
        self.linear = nn.Linear(site.width, site.width)

    def forward(self, hidden_states, context):  # [B, N, D] -> [B, N, D]
        return self.linear(hidden_states)

    def flops(self, tokens):
        return 2 * tokens * self.site.width**2
'''

_SKELETONS = {"mixer": _MIXER, "feed_forward": _FEED_FORWARD}


def write_skeleton(name: str, kind: str, folder: Path) -> Path:
    """Write a file with an operator that passes its checks, to be changed.

    Args:
        name: of the operator and its file, such as `token_roll`.
        kind: `mixer` or `feed_forward`.

    Raises `OperatorError` for a name that is no word or is taken, and `FileError` for a file that is there.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise OperatorError(f"The name of an operator is a word in small letters such as token_roll; got {name!r}.")
    if name in available():
        raise OperatorError(f"There is an operator {name!r} already. Choose another name.")
    path = folder / f"{name}.py"
    if path.exists():
        raise FileError(f"{path} is there already. Choose another name, or move it away.")
    # The registry makes the name of a file of that of its class, and this the other way round.
    cls = "".join(part.capitalize() for part in name.split("_"))
    write_text(path, _SKELETONS[kind].format(name=name, cls=cls))
    return path


def load_operator(path: Path) -> type[Operator]:
    """Run a file and return the operator that it defines.

    Raises `FileError` for one that is missing or does not run, and `OperatorError` unless it defines one operator.
    """
    # Raises for a file that is missing, in words.
    read_text(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    # A stranger's file may raise anything.
    except Exception as error:
        raise FileError(f"{path} does not run: {type(error).__name__}: {error}") from error
    # Operators that the file imports are not its own.
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Operator) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        names = ", ".join(one.__name__ for one in found) or "none"
        raise OperatorError(f"{path} defines {len(found)} operators ({names}). Define one, a class of Mixer say.")
    return found[0]
