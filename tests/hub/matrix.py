"""Every operator on every kind of site it serves, in small models: what `test_numbers` saves, and a new process loads."""
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import diffusers_graft as dg

from ..models import predict, tiny_dit, tiny_pixart
from .pipelines import draw, pipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = ("graft", "full", "pipeline")


def base(kind):
    return tiny_pixart(num_layers=1) if kind == "cross_attention" else tiny_dit(num_layers=2)


def cases():
    """Pairs of operator and kind, for the kinds that these two families have."""
    for name in dg.operators.available():
        for kind in dg.operators.get(name).kinds:
            if len(dg.find_sites(base(kind)).where(kind=kind)):
                yield name, kind


def rules(name, kind):
    spec = {"operator": name, "init": "random"} if kind != "block_pair" else name
    return {f"{kind}[0]": spec}


def save(folder, name, kind, dtype):
    """Save one graft in all its formats; returns the outputs."""
    model = base(kind).to(DTYPES[dtype])
    model.set_graft(rules(name, kind))
    model.save_graft(folder / "graft")
    model.save_pretrained(folder / "full")
    outputs = {"graft": predict(model), "full": predict(model)}
    if kind != "cross_attention":
        pipe = pipeline().to(DTYPES[dtype])
        pipe.transformer.set_graft(rules(name, kind))
        outputs["pipeline"] = torch.from_numpy(draw(pipe))
        pipe.save_pretrained(folder / "pipeline")
    return outputs


def load(folder, kind, dtype):
    """The outputs of what `save` wrote, loaded."""
    model = base(kind).to(DTYPES[dtype])
    model.load_graft(folder / "graft")
    outputs = {"graft": predict(model), "full": predict(dg.load_pretrained(folder / "full", dtype=DTYPES[dtype]))}
    if (folder / "pipeline").exists():
        outputs["pipeline"] = torch.from_numpy(draw(DiffusionPipeline.from_pretrained(folder / "pipeline", torch_dtype=DTYPES[dtype])))
    return outputs


if __name__ == "__main__":
    root, dtype = Path(sys.argv[1]), sys.argv[2]
    torch.save({f"{name} {kind}": load(root / f"{name} {kind}", kind, dtype) for name, kind in cases()}, root / "seen.pt")
