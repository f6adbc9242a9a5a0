"""Put the trained parts together: `python -m benchmarks.testbed.scenes.assemble --run DIR --output FOLDER`.

Writes a folder that `PixArtSigmaPipeline.from_pretrained` loads. Transformer and autoencoder are written in bfloat16,
which halves them; diffusers loads them in float32.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="the folder that the training wrote")
    parser.add_argument("--transformer", default="transformer", help="which of its transformers")
    parser.add_argument("--shift", type=float, default=3.0, help="of the scheduler's sigmas")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    transformer = load_transformer(arguments.run / arguments.transformer)
    ship(assemble(arguments.run, transformer, arguments.shift), arguments.run, arguments.output)


if __name__ == "__main__":
    main()
