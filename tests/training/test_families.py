"""Both stages of every family take a step, or say in words why they cannot."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin

import diffusers_graft as dg
from diffusers_graft.inspection.families import argument_names
from diffusers_graft.training.noised_batch import find_timestep_name

from ..inspection.models import ROWS, inputs_of, tiny

# What cannot be noised as it stands, with the words that say so.
REFUSED = {
    "AnyFlowFARTransformer3DModel": "flex BlockMask",
    "Cosmos3OmniTransformer": "takes no timestep",
    "Kandinsky6SRTransformer3DModel": "flex BlockMask",
    # Their latents come with channels of an image or a mask beside them, which they do not predict.
    "Kandinsky6Transformer3DModel": "a target of their own",
    "WanAnimateTransformer3DModel": "a target of their own",
    "MiniMaxMusic3RVQDepthDecoder": "takes no timestep",
    "RFD4ProteinaTransformer": "takes no timestep",
    "T5FilmDecoder": "takes no timestep",
}
NO_MODELS = {"DualTransformer2DModel"}
# Two streams, a list of samples, text in the answer, videos.
QUICK = ["SD3Transformer2DModel", "ZImageTransformer2DModel", "QwenImage21Transformer2DModel", "WanTransformer3DModel"]


def rules_for(model):
    kinds = {site.kind for site in dg.find_sites(model)}
    mixed = [kind for kind in ("self_attention", "joint_attention") if kind in kinds]
    if mixed:
        return {f"{kind}[0]": {"operator": "linear_attention", "init": "random"} for kind in mixed}
    if "cross_attention" in kinds:
        return {"cross_attention[0]": {"operator": "self_attention", "init": "random"}}
    return {"feed_forward[0]": {"operator": "mlp", "init": "random"}}


def clean_batch(name, model):
    # DiT's pictures are square.
    batch = inputs_of(name, **({"height": 4, "width": 4} if name == "DiTTransformer2DModel" else {}))
    sample = batch.pop(argument_names(type(model))[0])
    is_batch = isinstance(sample, list) and isinstance(sample[0], torch.Tensor)
    batch["sample"] = torch.stack(sample) if is_batch else sample
    batch.pop(find_timestep_name(model), None)
    batch.pop("return_dict", None)
    return batch


def take_steps(name):
    model = tiny(name)
    if not isinstance(model, ModelMixin):
        return
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    graft = dg.build_graft(model, dg.plan_graft(model, rules_for(model)))
    batches = [clean_batch(name, model)]
    common = {"steps": 1, "warmup": 0, "progress": False}
    reports = dg.distill(model, graft, batches, dg.DistillConfig(**common), noise_scheduler=scheduler)
    assert all(torch.tensor(report.losses).isfinite().all() for report in reports.values())
    model.set_graft(graft)
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    (loss,) = dg.finetune(model, batches, dg.FinetuneConfig(**common), noise_scheduler=scheduler)
    assert loss > 0
    assert any(not torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in sorted(ROWS)]
)
def test_both_stages_take_a_step(name):
    if name in REFUSED:
        with pytest.raises(dg.GraftError, match=REFUSED[name]):
            take_steps(name)
    elif name not in NO_MODELS:
        take_steps(name)


def test_most_families_train():
    assert len(ROWS) - len(NO_MODELS) >= 75
    assert len(REFUSED) <= 8
