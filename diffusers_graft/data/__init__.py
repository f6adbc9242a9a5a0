"""Training sets: pictures, streams and latents as people have them, sampled or encoded once. Public as `dg.data`."""

from .encoding import SampleEncoder, encode
from .folders import PictureFolder, open_dataset, open_shards, read_prompts
from .pipelines import from_pipeline, prompt_encoder
from .shards import Shards
from .streams import Stream

__all__ = [
    "PictureFolder",
    "SampleEncoder",
    "Shards",
    "Stream",
    "encode",
    "from_pipeline",
    "open_dataset",
    "open_shards",
    "prompt_encoder",
    "read_prompts",
]
