"""GenEval's score: whether pictures show the objects, counts, colours and positions of their prompts.

Paper: arXiv 2310.11513. The rules and thresholds are the original's; the networks are the same, as transformers has
them: Mask2Former with Swin-S trained on COCO, and CLIP ViT-L/14.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.storage import read_text
from ...errors import FileError, GraftError
from ..geneval.networks import COLOUR_MODEL, open_classifier, open_detector
from ..geneval.prompts import find_fault
from ..geneval.rules import judge, select_objects
from ..pictures import read_picture
from ..transformers_models import open_clip
from .base import PictureMetric
from .extractors import describe_network


@dataclass(frozen=True, kw_only=True)
class GenEval(PictureMetric):
    """Share of right pictures for each kind of prompt, and the mean over kinds, `geneval`.

    The conditions are GenEval's prompts, as `load_prompts` reads them; its authors draw four pictures of each.

    Attributes:
        detector: finds objects; by default Mask2Former.
        clip: a `ClipModel` for colours; by default ViT-L/14 of OpenAI.
    """

    detector: nn.Module | None = None
    clip: nn.Module | None = None

    def check(self, conditions: Sequence[Any]) -> None:
        for condition in conditions:
            fault = find_fault(condition)
            if fault:
                raise GraftError(f"GenEval takes prompts of load_prompts; of {condition!r} {fault}.")
        # An object that the detector cannot find would count as missing in every picture.
        known = set(self._open_detector().labels.values())
        asked = {entry["class"] for condition in conditions for entry in condition["include"]}
        if asked - known:
            raise GraftError(
                f"The detector knows no {', '.join(sorted(asked - known))}. It knows {', '.join(sorted(known))}."
            )
        self._open_clip()

    def measure(
        self, pictures: torch.Tensor, conditions: Sequence[Any], teacher_pictures: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        faults = self.find_faults(pictures, conditions)
        return {"correct": torch.tensor([float(not fault) for fault in faults])}

    def find_faults(self, pictures: torch.Tensor, conditions: Sequence[Any]) -> list[str]:
        """Return what is wrong with each picture [3, H, W] in [0, 1], in words, nothing for a right one."""
        classifier = open_classifier(self._open_clip())
        faults = []
        for picture, metadata, found in zip(pictures, conditions, self._open_detector().detect(pictures), strict=True):
            objects = select_objects(found, metadata["tag"])
            faults.append(judge(metadata, objects, functools.partial(classifier.classify, picture)))
        return faults

    def summarize(self, numbers: dict[str, torch.Tensor], conditions: Sequence[Any]) -> dict[str, float]:
        right: dict[str, list[float]] = {}
        for condition, value in zip(conditions, numbers["correct"].tolist(), strict=True):
            right.setdefault(condition["tag"], []).append(value)
        shares = {f"geneval_{tag}": sum(values) / len(values) for tag, values in right.items()}
        return {"geneval": sum(shares.values()) / len(shares), **shares}

    def protocol(self) -> dict[str, Any]:
        return {"detector": describe_network(self._open_detector()), "clip": describe_network(self._open_clip())}

    def _open_detector(self) -> Any:
        return open_detector() if self.detector is None else self.detector

    def _open_clip(self) -> Any:
        return open_clip(COLOUR_MODEL) if self.clip is None else self.clip


def score_geneval_folder(folder: str | Path, metric: GenEval | None = None) -> dict[str, float]:
    """Score pictures that lie as GenEval's own scorer reads them, whoever drew them.

    Args:
        folder: holds `00000/metadata.jsonl`, `00000/samples/0000.png` and so on.

    Raises `FileError` for a folder without such pictures, and for metadata that are damaged.
    """
    metric = metric or GenEval()
    conditions = []
    files = []
    # Other programs name pictures 00000.png, and leave some out.
    for path in sorted(Path(folder).glob("[0-9]*/metadata.jsonl")):
        metadata = json.loads(read_text(path))
        fault = find_fault(metadata)
        if fault:
            raise FileError(f"{path} is no metadata of GenEval: {fault}.")
        drawn = sorted((path.parent / "samples").glob("[0-9]*.png"))
        files += drawn
        conditions += [metadata] * len(drawn)
    if not files:
        raise FileError(
            f"{folder} holds no 00000/metadata.jsonl with 00000/samples/0000.png, as GenEval's folders do."
        )
    metric.check(conditions)
    right = []
    for path, condition in zip(files, conditions, strict=True):
        right.append(metric.measure(read_picture(path)[None], [condition], None)["correct"])
    return metric.summarize({"correct": torch.cat(right)}, conditions)
