"""Training sets on disk, made by a pipeline or encoded once from images. Public as `dg.data`."""

from .datasets import Shards, encode, from_pipeline, prompt_encoder

__all__ = ["Shards", "encode", "from_pipeline", "prompt_encoder"]
