"""Begin a run with the shipped weights: `python -m benchmarks.testbed.scenes.restore --run DIR`.

Every phase of the transformer's training then starts from the shipped average, with a warm-up, as if a phase had ended
there.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from diffusers_graft.testbed import scenes
from diffusers_graft.testbed.scenes.pipeline import WEIGHTS

from .assemble import LOGS

PARTS = ("tokenizer", "text_encoder", "vae", "transformer")


def restore(run: Path) -> None:
    """Write every part in float32, and the logs so far, where there is no run yet."""
    run.mkdir(parents=True, exist_ok=True)
    pipe = scenes.pipeline().to(torch.float32)
    for part in PARTS:
        if not (run / part).exists():
            getattr(pipe, part).save_pretrained(run / part)
    for name in LOGS:
        if not (run / name).exists():
            shutil.copy(WEIGHTS / name, run / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    restore(parser.parse_args().run)


if __name__ == "__main__":
    main()
