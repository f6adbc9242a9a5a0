"""Put the trained parts together: `python -m benchmarks.testbed.scenes.assemble --run DIR --output FOLDER`.

Writes a folder that `PixArtSigmaPipeline.from_pretrained` loads. Transformer and autoencoder are written in bfloat16,
which halves them; diffusers loads them in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5EncoderModel, T5Tokenizer

LOGS = ("autoencoder.jsonl", "text.jsonl", "training.jsonl")


def make_scheduler(shift: float) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order (arXiv 2211.01095) on the sigmas of flow matching."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def load_transformer(folder: Path) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


def blend(model: PixArtTransformer2DModel, other: PixArtTransformer2DModel, share: float) -> PixArtTransformer2DModel:
    """Move the weights of a model this share of the way to those of another, and return it.

    A phase starts from the average of the phase before it, and forgets some of what that one drew well. Between the
    weights of both lies a model that draws both sizes (WiSE-FT, arXiv 2109.01903).
    """
    start, end = model.state_dict(), other.state_dict()
    model.load_state_dict({name: torch.lerp(start[name], end[name], share) for name in start})
    return model


def assemble(run: Path, transformer: PixArtTransformer2DModel, shift: float) -> PixArtSigmaPipeline:
    """The pipeline of a run's parts and this transformer, in float32."""
    return PixArtSigmaPipeline(
        tokenizer=T5Tokenizer.from_pretrained(run / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(run / "text_encoder").eval(),
        vae=AutoencoderTiny.from_pretrained(run / "vae").eval(),
        transformer=transformer,
        scheduler=make_scheduler(shift),
    )


def ship(pipeline: PixArtSigmaPipeline, run: Path, output: Path) -> None:
    """Write the pipeline with the logs beside it; what else lies in the folder stays."""
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as temporary:
        pipeline.save_pretrained(temporary)
        shutil.copytree(temporary, output, dirs_exist_ok=True)
    for name in LOGS:
        if (run / name).exists():
            shutil.copy(run / name, output / name)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="the folder that the training wrote")
    parser.add_argument("--transformer", default="transformer", help="which of its transformers")
    parser.add_argument("--towards", help="another one, to whose weights it is moved a share of the way")
    parser.add_argument("--share", type=float, help="of that way, from 0 to 1")
    parser.add_argument("--shift", type=float, default=2.0, help="of the scheduler's sigmas")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    run, output, share = arguments.run, arguments.output, arguments.share
    if (arguments.towards is None) != (share is None):
        parser.error("--towards and --share are given together")
    if share is not None and not 0 <= share <= 1:
        parser.error(f"--share is a number from 0 to 1; got {share}")
    transformer = load_transformer(run / arguments.transformer)
    if share is not None:
        transformer = blend(transformer, load_transformer(run / arguments.towards), share)
    ship(assemble(run, transformer, arguments.shift), run, output)
    if share is not None:
        # the last line of the training, since it decides the weights as well
        row = {"blend": [arguments.transformer, arguments.towards], "share": share}
        with (output / "training.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
