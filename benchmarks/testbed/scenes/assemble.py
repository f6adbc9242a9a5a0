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


def blend(run: Path, names: list[str], share: float) -> PixArtTransformer2DModel:
    """The transformer of the first name, with this share of the way to the second one's weights, if there is one.

    A phase starts from the average of the phase before it, and forgets some of what that one drew well. Between the
    weights of both lies a model that draws both sizes (WiSE-FT, arXiv 2109.01903).
    """
    model = load_transformer(run / names[0])
    if len(names) > 1:
        end = load_transformer(run / names[1]).state_dict()
        start = model.state_dict()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="the folder that the training wrote")
    parser.add_argument(
        "--transformer", nargs="+", default=["transformer"], help="which of its transformers, or two of them"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of the way from the first of two to the second")
    parser.add_argument("--shift", type=float, default=2.0, help="of the scheduler's sigmas")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if len(arguments.transformer) > 2 or not 0 <= arguments.share <= 1:
        parser.error("one transformer, or two of them and a share between 0 and 1")
    transformer = blend(arguments.run, arguments.transformer, arguments.share)
    pipe = assemble(arguments.run, transformer, arguments.shift)
    ship(pipe, arguments.run, arguments.output)


if __name__ == "__main__":
    main()
