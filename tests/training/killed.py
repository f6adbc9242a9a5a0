"""A run that is killed: `python -m tests.training.killed one|two FOLDER STEP`."""

import os
import signal
import sys
from pathlib import Path

import torch

import diffusers_graft as dg

from ..models import SCHEDULER, batches, tiny_dit

RULES = {"self_attention[1::2]": {"operator": "hyena_x", "init": "random"}}
STEPS = 9


class Kill:
    """Ends this process at a step, as a power cut does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(stage, folder=None, **settings):
    """Weights of the graft after one stage, by name, and what the stage returned."""
    torch.set_num_threads(1)
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, RULES))
    common = {"steps": STEPS, "lr": 1e-3, "warmup": 2, "save_every": 2, "log_every": 1, "progress": False}
    data = (batch for _ in range(99) for batch in batches())  # can be read once
    if stage == "one":
        config = dg.DistillConfig(
            **common, evaluate_every=3, patience=2, closed_form=dg.ClosedFormConfig(steps=2, progress=False)
        )
        result = dg.distill(
            model,
            graft,
            data,
            config,
            noise_scheduler=SCHEDULER,
            held_out=batches(2, seed=9),
            output_dir=folder,
            **settings,
        )
        model.set_graft(graft)
        result = {address: report.to_dict() for address, report in result.items()}
    else:
        model.set_graft(graft)
        config = dg.FinetuneConfig(**common, ema_decay=0.9)
        result = dg.finetune(model, data, config, noise_scheduler=SCHEDULER, output_dir=folder, **settings)
    return {name: tensor.detach().clone() for name, tensor in graft.tensors(model).items()}, result


if __name__ == "__main__":
    stage, folder, step = sys.argv[1:]
    run(stage, Path(folder), callbacks=[Kill(int(step))])
