"""One of several processes that train together: `accelerate`'s variables in the environment, results to a folder."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

import diffusers_graft as dg

from ..models import SCHEDULER, batches, tiny_dit

RULES = {
    "self_attention[1::2]": {"operator": "hyena_x", "init": "random"},
    "feed_forward[1]": {"operator": "mlp", "init": "random"},
}


def both_stages(folder=None, resume=False):
    """Weights after stage one and after stage two; the loss of one batch does not depend on who computes it."""
    torch.set_num_threads(1)
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, RULES))
    common = {"steps": 6, "lr": 1e-3, "warmup": 2, "progress": False, "save_every": 3}
    one = dg.DistillConfig(**common, evaluate_every=2, accumulate=2, loss={"self_attention[1]": "relative_l2"})
    reports = dg.distill(
        model,
        graft,
        batches(),
        one,
        noise_scheduler=SCHEDULER,
        held_out=batches(1, seed=9),
        output_dir=folder,
        resume=resume,
    )
    again = dg.DistillConfig(**common, reuse=2, ring=2)
    dg.distill(
        model,
        graft,
        batches(),
        again,
        noise_scheduler=SCHEDULER,
        output_dir=folder and folder / "again",
        resume=resume,
    )
    model.set_graft(graft)
    after_one = {f"one.{name}": tensor.detach().clone() for name, tensor in graft.tensors(model).items()}
    two = dg.FinetuneConfig(**common, ema_decay=0.5, min_snr=5.0, distill_output=0.5)
    losses = dg.finetune(model, batches(), two, noise_scheduler=SCHEDULER, output_dir=folder, resume=resume)
    after_two = {f"two.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    first = [report.losses for report in reports.values()]
    return {**after_one, **after_two, "losses": torch.tensor([*first, losses])}


if __name__ == "__main__":
    result = both_stages(Path(sys.argv[1]) / "run")
    save_file(result, Path(sys.argv[1]) / f"{PartialState().process_index}.safetensors")
    PartialState().destroy_process_group()
