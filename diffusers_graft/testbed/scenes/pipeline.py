"""The pretrained text-to-image pipeline, a `PixArtSigmaPipeline` of diffusers that draws scenes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import warnings
from pathlib import Path

from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.utils import logging

from ...core.storage import sha256_of
from ...errors import GraftError, ModelError

WEIGHTS = Path(__file__).parent / "weights"


def pipeline(transformer: PixArtTransformer2DModel | None = None) -> PixArtSigmaPipeline:
    """Load the pretrained pipeline.

    It draws 256 x 256 pixels (1,024 tokens), and other sizes with `use_resolution_binning=False`. Beside what
    diffusers checks, it warns of empty prompts and of words that it never learned, and refuses schedulers of other
    families. A copy that diffusers itself saves and loads checks what diffusers checks; `draw_prompts` checks both.

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
    check_scheduler(pipe)
    if prompt is not None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts:
            raise GraftError("The list of prompts is empty. Give a prompt, or several.")
        require_text_encoder(pipe)
        warn_of_unknown_words(pipe, prompts)
    # An empty negative prompt is the usual one.
    if settings.get("negative_prompt"):
        negative = settings["negative_prompt"]
        warn_of_unknown_words(pipe, [negative] if isinstance(negative, str) else [one for one in negative if one])
    encode = PixArtSigmaPipeline.encode_prompt
    return encode(pipe, prompt, *arguments, **settings)  # pyright: ignore[reportArgumentType]  # None with embeddings


def require_text_encoder(pipe: PixArtSigmaPipeline) -> None:
    """Raise `ModelError` where text encoder or tokenizer is missing."""
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ModelError(
            "The pipeline has no text encoder or no tokenizer; prompts cannot be read. Load it with both."
        )


def check_scheduler(pipe: PixArtSigmaPipeline) -> None:
    """Raise `GraftError` for a scheduler that does not take velocities of flow matching, or not from this pipeline."""
    scheduler = pipe.scheduler
    if type(scheduler).__name__.startswith("FlowMatch"):
        raise GraftError(
            f"PixArtSigmaPipeline cannot run {type(scheduler).__name__}, which lacks scale_model_input or "
            "init_noise_sigma. Use DPMSolverMultistepScheduler or UniPCMultistepScheduler, made by from_config from "
            "the pipeline's scheduler."
        )
    # `from_config` carries settings that a class does not have, so the class is asked, too.
    knows_flow = "use_flow_sigmas" in inspect.signature(type(scheduler).__init__).parameters
    is_flow = scheduler.config.get("prediction_type") == "flow_prediction" and scheduler.config.get("use_flow_sigmas")
    if not (knows_flow and is_flow):
        raise GraftError(
            f"{type(scheduler).__name__} (prediction_type={scheduler.config.get('prediction_type')!r}) does not fit a "
            "model trained by flow matching. Make it by from_config from the pipeline's scheduler, with "
            'use_flow_sigmas=True and prediction_type="flow_prediction", of a class that takes both, such as '
            "UniPCMultistepScheduler."
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
