"""Entries of a card's front matter that the Hub accepts: tasks, licenses, and ids of data sets.

The Hub refuses a push whose metadata it does not know, after everything was uploaded; these tables find it before.
"""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import GraftError, UnknownNameError

TASKS = (
    "any-to-any",
    "audio-to-audio",
    "depth-estimation",
    "image-segmentation",
    "image-text-to-image",
    "image-text-to-video",
    "image-to-3d",
    "image-to-image",
    "image-to-video",
    "mask-generation",
    "text-to-3d",
    "text-to-audio",
    "text-to-image",
    "text-to-speech",
    "text-to-video",
    "unconditional-image-generation",
    "video-to-video",
)

# Licenses by their ids on the Hub; `other` goes with license_name and license_link.
LICENSES = tuple(
    [
        "afl-3.0",
        "agpl-3.0",
        "apache-2.0",
        "apple-amlr",
        "apple-ascl",
        "artistic-2.0",
        "bigcode-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigscience-openrail-m",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "bsl-1.0",
        "c-uda",
        "cc",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc0-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "cdla-sharing-1.0",
        "creativeml-openrail-m",
        "deepfloyd-if-license",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "fair-noncommercial-research-license",
        "gemma",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "grok2-community",
        "h-research",
        "intel-research",
        "isc",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "lgpl-lr",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "lppl-1.3c",
        "mit",
        "mpl-2.0",
        "ms-pl",
        "mulanpsl-2.0",
        "ncsa",
        "odbl",
        "odc-by",
        "ofl-1.1",
        "open-mdw",
        "openmdw-1.0",
        "openrail",
        "openrail++",
        "osl-3.0",
        "other",
        "pddl",
        "postgresql",
        "unknown",
        "unlicense",
        "wtfpl",
        "zlib",
    ]
)

# Classes whose names do not end in their task; None where the Hub has no task of this kind.
_TASK_OF_CLASS = {
    "ChronoEditTransformer3DModel": "image-to-image",
    "Cosmos3OmniTransformer": "any-to-any",
    "DiTTransformer2DModel": "unconditional-image-generation",
    "HunyuanVideoFramepackTransformer3DModel": "image-to-video",
    "JoyImageEditPlusTransformer3DModel": "image-to-image",
    "JoyImageEditTransformer3DModel": "image-to-image",
    "Kandinsky6SRTransformer3DModel": "video-to-video",
    "LongCatAudioDiTTransformer": "text-to-audio",
    "MiniMaxMusic3RVQDepthDecoder": "text-to-audio",
    "PriorTransformer": "text-to-image",
    "RFD4ProteinaTransformer": None,
    "SanaWMLTX2RefinerTransformer3DModel": "video-to-video",
    "SanaWMTransformer3DModel": "image-to-video",
    "StableAudio3DiTModel": "text-to-audio",
    "StableAudioDiTModel": "text-to-audio",
    "T5FilmDecoder": "text-to-audio",
    "TransformerTemporalModel": "text-to-video",
    "UNet2DConditionModel": "text-to-image",
    "UNet2DModel": "unconditional-image-generation",
    "UNet3DConditionModel": "text-to-video",
    "UNetMotionModel": "text-to-video",
    "UNetSpatioTemporalConditionModel": "image-to-video",
    "WanAnimate2Transformer3DModel": "image-to-video",
    "WanAnimateTransformer3DModel": "image-to-video",
}
_TASK_OF_ENDING = {"1DModel": "text-to-audio", "2DModel": "text-to-image", "3DModel": "text-to-video"}


def task_of(model_class: str) -> str | None:
    """Return the Hub's task of a diffusers class; None where it has none, or the class is not known."""
    if model_class in _TASK_OF_CLASS:
        return _TASK_OF_CLASS[model_class]
    return next((task for ending, task in _TASK_OF_ENDING.items() if model_class.endswith(ending)), None)


def is_dataset_id(name: str) -> bool:
    """Return whether a name may be that of a data set on the Hub: `imagenet-1k`, `user/name`."""
    # validate_repo_id accepts letters that no data set has in its id
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_license(license: Any, name: Any = None, link: Any = None) -> None:
    """Raise an error for a license that the Hub would refuse.

    Args:
        license: its id on the Hub, or `other`.
        name, link: of a license that the Hub has no id for.

    Raises `UnknownNameError` for an unknown id, `GraftError` for `other` without a name, or a name without `other`.
    """
    if license is None and name is None and link is None:
        return
    if license != "other":
        if license is not None and license not in LICENSES:
            raise UnknownNameError(
                "license of the Hub (of another, give license='other' and license_name)", license, LICENSES
            )
        if name is not None or link is not None:
            raise GraftError("A license_name and a license_link are of a license without an id: give license='other'.")
    elif name is None:
        raise GraftError(
            "A license that is 'other' has a name: give license_name, and license_link where there is one."
        )


def check_task(task: Any) -> None:
    """Raise `UnknownNameError` for a pipeline tag that is no task of the Hub, None aside."""
    if task is not None and task not in TASKS:
        raise UnknownNameError("task of the Hub (pipeline_tag)", task, TASKS)
