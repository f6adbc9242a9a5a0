"""The pretrained text-to-image pipeline, a `PixArtSigmaPipeline` of diffusers that draws scenes."""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.utils import logging

from ...core.storage import sha256_of
from ...errors import GraftError, ModelError

WEIGHTS = Path(__file__).parent / "weights"


def pipeline(transformer: PixArtTransformer2DModel | None = None) -> PixArtSigmaPipeline:
    """Load the pretrained pipeline.

    It draws 256 x 256 pixels (1,024 tokens), and other sizes with `use_resolution_binning=False`. Beside what
    diffusers checks, it warns of empty prompts and of words that it never learned, and refuses schedulers of other
    families.

    Args:
        transformer: used instead of the pretrained one, grafted for example.
    """
    components = {}
    if transformer is not None:
        components["transformer"] = transformer
    # diffusers warns of every AutoencoderTiny in this pipeline, and of a setting that its class writes itself.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded = PixArtSigmaPipeline.from_pretrained(str(WEIGHTS), **components)
    finally:
        logging.set_verbosity(verbosity)
    loaded.transformer.eval()
    # An attribute of the instance, so that the pipeline is saved and loaded as diffusers' own class.
    loaded.encode_prompt = functools.partial(_encode_checked_prompt, loaded)
    return loaded


def weights_version() -> str:
    """Return what tells trainings of the pipeline from each other: the first digits of a digest of all its parts."""
    # parts lie in folders; card and logs beside them draw nothing
    digests = [sha256_of(path) for path in sorted(WEIGHTS.glob("*/*"))]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]


def _encode_checked_prompt(
    pipe: PixArtSigmaPipeline, prompt: str | list[str] | None = None, *arguments, **settings
) -> tuple:
    check_pipeline(pipe)
    if prompt is not None:
        warn_of_unknown_words(pipe, [prompt] if isinstance(prompt, str) else prompt)
    # An empty negative prompt is the usual one.
    if settings.get("negative_prompt"):
        negative = settings["negative_prompt"]
        warn_of_unknown_words(pipe, [negative] if isinstance(negative, str) else [one for one in negative if one])
    encode = PixArtSigmaPipeline.encode_prompt
    return encode(pipe, prompt, *arguments, **settings)  # pyright: ignore[reportArgumentType]  # None with embeddings


def check_pipeline(pipe: PixArtSigmaPipeline) -> None:
    """Refuse a pipeline that would draw wrong pictures without a word.

    Raises `ModelError` where text encoder or tokenizer is missing, and `GraftError` for a scheduler that does not take
    velocities of flow matching.
    """
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ModelError(
            "The pipeline has no text encoder or no tokenizer; prompts cannot be read. Load it with both."
        )
    scheduler = pipe.scheduler
    is_flow = scheduler.config.get("prediction_type") == "flow_prediction" and scheduler.config.get("use_flow_sigmas")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise GraftError(
            "PixArtSigmaPipeline cannot run FlowMatchEulerDiscreteScheduler, which lacks scale_model_input. Use "
            "DPMSolverMultistepScheduler or UniPCMultistepScheduler, made by from_config from the pipeline's "
            "scheduler."
        )
    if not is_flow:
        raise GraftError(
            f"{type(scheduler).__name__} (prediction_type={scheduler.config.get('prediction_type')!r}) does not fit a "
            "model trained by flow matching. Make it by from_config from the pipeline's scheduler, with "
            "use_flow_sigmas=True and "
            'prediction_type="flow_prediction".'
        )


def warn_of_unknown_words(pipe: PixArtSigmaPipeline, prompts: list[str]) -> None:
    """Warn of words that become `<unk>`, and of prompts without words, which draw a scene at random."""
    tokenizer = pipe.tokenizer
    unknown = []
    for word in dict.fromkeys(word for prompt in prompts for word in prompt.lower().split()):
        if tokenizer.unk_token_id in tokenizer(word).input_ids:
            unknown.append(word)
    if unknown:
        warnings.warn(
            f"Words that the scenes never learned are read as <unk>: {', '.join(unknown)}. "
            "`testbed.scenes.vocabulary()` lists those it knows.",
            stacklevel=2,
        )
    if any(not prompt.strip() for prompt in prompts):
        warnings.warn("An empty prompt draws a scene at random.", stacklevel=2)
