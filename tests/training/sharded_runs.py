"""One of two processes over which weights are sharded: `accelerate`'s variables in the environment, results to a
folder.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import save_file

import diffusers_graft as dg
from diffusers_graft.training.fsdp import shard

from ..models import SCHEDULER, batches, tiny_dit
from .shared_runs import RULES

LORA = LoraConfig(r=2, target_modules=["to_q"])
WAYS = {
    "features": {"distill_features": 0.5, "gradient_checkpointing": True, "accumulate": 2},
    "lora": {"train": "operators+lora", "lora": LORA, "distill_output": 1.0},
    "compiled": {"train": "operators", "compile": "eager", "weight_decay": 0.1},
    "half": {"precision": "fp16", "lr": 1e-4},
    "momentum": {"optimizer": "SGD", "optimizer_args": {"momentum": 0.9}, "ema_decay": 0.9},
}


class Stop:
    """Ends a stage before its last step."""

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 2


def train(way, folder=None, callbacks=(), **more):
    """Weights after stage two."""
    model = tiny_dit()
    model.set_graft(RULES)
    config = dg.FinetuneConfig(**{"steps": 4, "lr": 1e-3, "warmup": 2, "progress": False, **WAYS[way]})
    dg.finetune(model, batches(), config, noise_scheduler=SCHEDULER, output_dir=folder, callbacks=callbacks, **more)
    return {f"{way}.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}


def every_setting():
    """Weights after stage two with every setting."""
    return {name: tensor for way in WAYS for name, tensor in train(way).items()}


def share_of_the_weights():
    """How many numbers of the model this process holds while it trains, and how many there are."""
    model = tiny_dit()
    with shard(model, dg.find_sites(model)) as twin:
        held = sum(parameter.to_local().numel() for parameter in twin.parameters())
    return torch.tensor([held, sum(parameter.numel() for parameter in model.parameters())])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = {**every_setting(), "share": share_of_the_weights()}
    for way in ("lora", "momentum"):
        train(way, folder / way, callbacks=[Stop()])
        result |= {f"resumed.{name}": tensor for name, tensor in train(way, folder / way, resume=True).items()}
    save_file(result, folder / f"{PartialState().process_index}.safetensors")
    PartialState().destroy_process_group()
