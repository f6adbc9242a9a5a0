"""Metrics for `dg.evaluate`, one file each."""

from ..geneval.prompts import load_prompts as load_geneval_prompts
from .clip_score import CLIPScore
from .cmmd import CMMD
from .fd_dinov2 import FDDINOv2
from .fid import FID
from .geneval import GenEval, score_geneval_folder
from .inception_score import InceptionScore
from .kid import KID
from .picture_distance import PictureDistance
from .precision_recall import PrecisionRecall
from .prediction_error import PredictionError
from .preference import HPSv2, ImageReward
from .reference import Reference, read_images, save_reference, write_images
from .sfid import SFID

__all__ = [
    "CLIPScore",
    "CMMD",
    "FDDINOv2",
    "FID",
    "GenEval",
    "HPSv2",
    "ImageReward",
    "InceptionScore",
    "KID",
    "PictureDistance",
    "PrecisionRecall",
    "PredictionError",
    "Reference",
    "SFID",
    "load_geneval_prompts",
    "read_images",
    "save_reference",
    "score_geneval_folder",
    "write_images",
]
