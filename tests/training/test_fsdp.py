"""Sharded weights in every model: a group of one process shards, gathers and reduces as one of many does."""

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import distributed

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.training import distributed as processes
from diffusers_graft.training import fsdp as sharding
from diffusers_graft.training.fsdp import shard

from ..injection.families import NAMES
from ..inspection.models import first, inputs_of, tiny
from ..models import SCHEDULER, batches, tensors_of, tiny_dit

RULES = {"self_attention[1::2]": {"operator": "hyena_x", "init": "random"}}
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # told to those who change answers in place
SAMPLES_ONLY = {"AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel"}  # flex attention without compiling


@pytest.fixture(autouse=True, scope="module")
def group():
    processes.process_state()  # which would take the group below for a launch
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "fsdp_plugin", lambda *_: FullyShardedDataParallelPlugin(fsdp_version=2))
        yield
    distributed.destroy_process_group()


def gradients(model, name):
    """The output, and the gradient of every parameter that got one."""
    with torch.set_grad_enabled(name not in SAMPLES_ONLY):
        output = first(model(**inputs_of(name)))
    if output.requires_grad:
        output.float().square().mean().backward()
    return output.detach(), {
        n: sharding.full_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_family_gives_the_same_outputs_and_gradients(name):
    model = tiny(name).eval()
    with shard(model, dg.find_sites(model), trained=True) as twin:
        assert all(isinstance(parameter, sharding.DTensor) for parameter in twin.parameters())
        output, found = gradients(twin, name)
    expected, wanted = gradients(model, name)
    assert torch.equal(output, expected)
    assert bool(wanted) == (name not in SAMPLES_ONLY)
    assert set(wanted) <= set(found)
    for (
        path,
        gradient,
    ) in found.items():  # of zeros where a second answer, which is not asked for, has weights of its own
        torch.testing.assert_close(gradient, wanted.get(path, torch.zeros_like(gradient)), rtol=1e-5, atol=1e-7)


def test_trained_weights_are_copied_back_also_after_a_loss_that_is_nan():
    good, bad = batches(2)
    bad["sample"][0] = float("nan")
    model = tiny_dit()
    model.set_graft(RULES)
    before = tensors_of(model)
    with pytest.raises(TrainingError, match="at step 1, batch 1"):
        dg.finetune(model, [good, bad], dg.FinetuneConfig(steps=3, lr=1e-3, progress=False), noise_scheduler=SCHEDULER)
    after = tensors_of(model)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not any(isinstance(tensor, sharding.DTensor) for tensor in model.state_dict().values())


def test_after_ctrl_c_the_model_has_the_weights_it_came_with():
    def interrupted():
        yield from batches(2)
        raise KeyboardInterrupt

    model = tiny_dit()
    model.set_graft(RULES)
    before = tensors_of(model)
    with pytest.raises(KeyboardInterrupt):
        dg.finetune(model, interrupted(), dg.FinetuneConfig(steps=9, progress=False), noise_scheduler=SCHEDULER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def half(model):
    """In bfloat16, but for a part that stays precise."""
    model.to(torch.bfloat16)
    model.transformer_blocks[0].norm1.to(torch.float32)
    return model


def test_frozen_weights_may_be_of_several_dtypes_and_trained_ones_of_one():
    model = half(tiny_dit())
    model.set_graft(RULES)
    before = tensors_of(model)
    data = [{"sample": batch["sample"], "class_labels": batch["class_labels"]} for batch in batches()]
    common = {"steps": 2, "lr": 1e-2, "progress": False, "precision": "bf16"}
    with pytest.raises(TrainingError, match="bfloat16 and torch.float32: call model.to"):
        dg.finetune(model, data, dg.FinetuneConfig(train="all", **common), noise_scheduler=SCHEDULER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dg.finetune(model, data, dg.FinetuneConfig(train="operators", **common), noise_scheduler=SCHEDULER)
    after = model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed
    assert {name.rpartition(".attn1.")[0] for name in changed} == {"transformer_blocks.1", "transformer_blocks.3"}
    graft = model.unset_graft()
    reports = dg.distill(model, graft, data, dg.DistillConfig(**common), noise_scheduler=SCHEDULER)
    assert all(len(report.losses) == 2 for report in reports.values())


def test_removing_a_graft_after_sharded_training_gives_the_original_bit_for_bit():
    model = tiny_dit()
    before = tensors_of(model)
    model.set_graft(RULES)
    dg.finetune(
        model, batches(), dg.FinetuneConfig(steps=3, progress=False, distill_features=1.0), noise_scheduler=SCHEDULER
    )
    model.unset_graft()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_teacher_is_sharded_and_the_new_parts_are_not():
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, RULES))
    kinds = set()
    graft.seats["transformer_blocks.1.attn1"].register_forward_pre_hook(
        lambda seat, _: kinds.add(type(seat.to_v.weight))
    )
    dg.distill(model, graft, batches(), dg.DistillConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    assert kinds == {torch.nn.Parameter}
    assert not any(
        isinstance(tensor, sharding.DTensor) for path in graft.seats for tensor in graft.tensors_of(path).values()
    )
