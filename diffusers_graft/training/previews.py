"""Looks at the graft as it stands, every so many steps of its training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from diffusers import ModelMixin

from .callbacks import RunState


class Preview(ABC):
    """Something that is done with the grafted model while it is trained: drawing samples, pushing it.

    Where weights are sharded over processes, it is left out: no pipeline runs with them.
    """

    @abstractmethod
    def is_due(self, state: RunState) -> bool:
        """Return whether it is time after this step; the same on every process."""

    @abstractmethod
    def show(self, model: ModelMixin, state: RunState, trackers: Sequence[Any]) -> None:
        """Do it, on every process.

        Args:
            model: grafted, in evaluation mode, with the weights that training has reached.
            trackers: of accelerate; none on processes that do not write.
        """
