"""Every operator on every kind of site it serves, in small models: what `test_bit_equal_reload` saves, and a new process loads.

All operators of a kind sit in one model, each at a site of its own, so that few files say it of all of them.
"""

import sys
from pathlib import Path
from unittest import mock

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PixArtAlphaPipeline
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import diffusers_graft as dg
from diffusers_graft.cards import edit_table as edits
from diffusers_graft.operators import Mixer
from tests.tiny_models import inputs_of, tiny

from ..models import predict, tiny_dit, tiny_pixart
from .pipelines import autoencoder, draw, pipeline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCKS = ("block", "block_pair", "block_run")


def serving(kind):
    """Names of the operators that may replace a part of a kind; mixers serve joint attention as they do
    self-attention.
    """
    known = {name: dg.operators.get(name) for name in dg.operators.available()}
    if kind == "joint_attention":
        return [
            name
            for name, operator in known.items()
            if issubclass(operator, Mixer) and "self_attention" in operator.kinds
        ]
    return [name for name, operator in known.items() if kind in operator.kinds]


def _at(kind):
    return {f"{kind}[{index}]": {"operator": name, "init": "random"} for index, name in enumerate(serving(kind))}


def _blocks(first):
    """Six layers for each operator from an even one on: one block, a pair, a run of two."""
    rules = {}
    for name in serving("block"):
        rules |= {f"block_pair[{first // 2 + 1}]": name, f"block_run[{first + 4}:{first + 6}]": name}
        if not dg.operators.get(name).runs_blocks:  # what runs blocks side by side needs two
            rules[f"block[{first}]"] = name
        first += 6
    return rules, first


def rules(family):
    """Rules for a family, and how many layers they need."""
    if family == "dit":
        parts = {**_at("self_attention"), **_at("feed_forward")}
        blocks, layers = _blocks(2 * -(-len(serving("self_attention")) // 2))
        return {**parts, **blocks}, layers
    kind = {"pixart": "cross_attention", "sd3": "joint_attention"}[family]
    return _at(kind), len(serving(kind)) + (family == "sd3")  # the last joint block of SD3 gives no text


def base(family):
    layers = rules(family)[1]
    if family == "dit":
        return tiny_dit(num_layers=layers, in_channels=4, out_channels=4, num_embeds_ada_norm=1000)
    return tiny_pixart(num_layers=layers) if family == "pixart" else tiny("SD3Transformer2DModel", num_layers=layers)


@torch.no_grad()
def outputs(model):
    """Of the model, and of each of its blocks, which tells where a difference begins."""
    seen = {}
    hooks = [
        block.register_forward_hook(
            lambda module, args, output, index=index: seen.update({f"block {index}": _first(output)})
        )
        for index, block in enumerate(model.transformer_blocks)
    ]
    if type(model).__name__.startswith("SD3"):
        inputs = {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in inputs_of("SD3Transformer2DModel").items()
        }
        seen["output"] = model(**inputs).sample
    else:
        seen["output"] = predict(model)
    for hook in hooks:
        hook.remove()
    return seen


def _first(output):
    output = output.sample if isinstance(output, Transformer2DModelOutput) else output
    return output if isinstance(output, torch.Tensor) else output[-1]


def pipe_of(model):
    if type(model).__name__.startswith("DiT"):
        return pipeline(model)
    return PixArtAlphaPipeline(None, None, autoencoder(), model, DDIMScheduler())


def drawn(pipe):
    if isinstance(pipe, PixArtAlphaPipeline):
        prompt = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(2)).to(pipe.transformer.dtype)
        mask = torch.ones(1, 6)
        words = {
            "prompt_embeds": prompt,
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": 0 * prompt,
            "negative_prompt_attention_mask": mask,
        }
        pipe.set_progress_bar_config(disable=True)
        picture = pipe(
            None,
            negative_prompt=None,
            **words,
            num_inference_steps=2,
            height=8,
            width=8,
            use_resolution_binning=False,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        return {"image": torch.from_numpy(picture)}
    return {"image": torch.from_numpy(draw(pipe))}


FAMILIES = ("dit", "pixart", "sd3")


def save(folder, family, dtype):
    """Save one graft in all its formats; returns what each must give."""
    model = base(family).to(DTYPES[dtype])
    model.set_graft(rules(family)[0])
    expected = {"graft": outputs(model)}
    expected["full"] = expected["graft"]
    with mock.patch.object(
        edits, "_count_flops", return_value=(None, {}, {})
    ):  # cards, which count them, have tests of their own
        model.save_graft(folder / "graft")
        model.save_pretrained(folder / "full", max_shard_size="200KB")
        if family != "sd3":
            pipe = pipe_of(model).to(DTYPES[dtype])
            pipe.save_pretrained(folder / "pipeline")
            expected["pipeline"] = drawn(pipe)
    return expected


def load(folder, family, dtype):
    """The outputs of what `save` wrote, loaded."""
    model = base(family).to(DTYPES[dtype])
    model.load_graft(folder / "graft")
    seen = {"graft": outputs(model), "full": outputs(dg.load_pretrained(folder / "full", dtype=DTYPES[dtype]))}
    if (folder / "pipeline").exists():
        seen["pipeline"] = drawn(DiffusionPipeline.from_pretrained(folder / "pipeline", torch_dtype=DTYPES[dtype]))
    return seen


if __name__ == "__main__":
    root = Path(sys.argv[1])
    cases = [(family, dtype) for family in FAMILIES for dtype in DTYPES]
    torch.save(
        {f"{family} {dtype}": load(root / f"{family} {dtype}", family, dtype) for family, dtype in cases},
        root / "seen.pt",
    )
