"""Training sets on disk, sampled by a pipeline or encoded once from images. Public as `dg.data`."""

from .encoding import SampleEncoder, encode
from .pipelines import from_pipeline, prompt_encoder
from .shards import Shards

__all__ = ["SampleEncoder", "Shards", "encode", "from_pipeline", "prompt_encoder"]
