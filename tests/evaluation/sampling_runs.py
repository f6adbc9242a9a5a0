"""One process that draws the samples of the tests: `sampling_runs FOLDER [KILL_AFTER|-] [REFERENCE]`."""

import os
import signal
import sys
from pathlib import Path

import diffusers_graft as dg
from diffusers_graft.evaluation import sampling
from diffusers_graft.evaluation.metrics import Reference

from .pipelines import LABELS, SAMPLING, judged_by, tiny_pipeline


def kill_after(count):
    """End this process like a lost machine when it writes the next sample after so many."""
    write = sampling.write_picture
    written = []

    def write_or_die(path, pixels):
        if len(written) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        write(path, pixels)

    sampling.write_picture = write_or_die


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if sys.argv[2] != "-":
        kill_after(int(sys.argv[2]))
    chosen = judged_by(Reference(sys.argv[3])) if sys.argv[3:] else []
    scores = dg.evaluate(tiny_pipeline(), LABELS, sampling=SAMPLING, metrics=chosen, output=folder)
    scores.save(folder.parent / f"{os.environ.get('RANK', 0)}.json")
