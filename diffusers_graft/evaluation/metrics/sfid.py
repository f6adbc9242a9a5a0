"""sFID, the Frechet distance of 2,023 spatial features of Inception. Paper: arXiv 2103.03841."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .extractors import SPATIAL
from .fid import FID


@dataclass(frozen=True, kw_only=True)
class SFID(FID):
    """Frechet distance of features that keep where things are: seven channels of a middle layer, 17 x 17 x 7."""

    name: ClassVar[str] = "sfid"
    output: ClassVar[str] = SPATIAL
