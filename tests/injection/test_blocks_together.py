"""Blocks side by side together with everything else: operators inside them, LoRA, compilation, names, closed forms,
the trainer.
"""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

import diffusers_graft as dg
from diffusers_graft.errors import OperatorError, StateError

from ..inspection.models import inputs_of, tiny
from ..inspection.models import predict as predict_in_zoo
from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit

INSIDE = "self_attention[:]=hyena_x; feed_forward[1]=mlp(expansion=3); block_pair[:]=parallel"
MIXED = "self_attention[2]=hyena_x; block[0]=remove; block[1]=linear_block; block_run[2:4]=parallel(merge='gated')"


def comes_back(model, base, folder, original):
    """Saved, loaded and undone bit for bit, as a graft and as a whole model."""
    output = predict(model)
    model.save_graft(folder / "graft")
    model.save_pretrained(folder / "whole")
    model.unset_graft()
    assert same_tensors(model, base)
    assert torch.equal(predict(model), original)
    model.load_graft(folder / "graft")
    assert torch.equal(predict(model), output)
    assert torch.equal(predict(dg.load_pretrained(folder / "whole")), output)


@pytest.mark.parametrize("rules", [INSIDE, MIXED], ids=["inside", "mixed"])
@pytest.mark.parametrize("train", ["operators", "operators+lora", "all"])
def test_finetuned_with_and_without_lora(rules, train, tmp_path):
    model = tiny_dit()
    base, original = tensors_of(model), predict(model)
    model.set_graft(rules)
    before = predict(model)
    lora = LoraConfig(r=2, target_modules=["to_q", "proj"]) if train == "operators+lora" else None
    config = dg.FinetuneConfig(steps=2, lr=1e-2, train=train, lora=lora, progress=False)
    dg.finetune(model, batches(2), config, noise_scheduler=SCHEDULER)
    assert not torch.equal(predict(model), before)
    comes_back(model, base, tmp_path, original)


@pytest.mark.parametrize("rules", [INSIDE, MIXED], ids=["inside", "mixed"])
def test_lora_of_peft_comes_and_goes(rules):
    model = tiny_dit()
    original = predict(model)
    model.set_graft(rules)
    grafted, base = predict(model), tensors_of(model)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "proj"], init_lora_weights=False), model)
    assert not torch.equal(predict(model), grafted)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if hasattr(child, "get_base_layer"):
                setattr(module, name, child.get_base_layer())
    assert same_tensors(model, base)
    assert torch.equal(predict(model), grafted)
    model.unset_graft()
    assert torch.equal(predict(model), original)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("DiTTransformer2DModel", "self_attention[:]=hyena_x; block_pair[:]=parallel"),
        ("SD3Transformer2DModel", "block_pair[:]=parallel"),
        ("DiTTransformer2DModel", "block[0]=remove; block[1]=linear_block(init='random')"),
    ],
    ids=["dit", "sd3", "removed"],
)
def test_compiles_as_one_graph(name, rules):
    model = tiny(name)
    model.set_graft(rules)
    eager = predict_in_zoo(model, name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs_of(name), return_dict=False)[0], eager)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("rules", "path"),
    [
        ("block_pair[0]=parallel", "transformer_blocks.0"),
        ("self_attention[0]=hyena_x", "transformer_blocks.0.attn1"),
    ],
)
def test_parts_that_were_compiled_by_themselves_are_replaced(rules, path):
    model = tiny_dit(num_layers=2)
    model.set_graft(rules)
    wanted = predict(model)
    model.unset_graft()
    model.get_submodule(path).compile(backend="eager")
    model.set_graft(rules)
    assert torch.equal(predict(model), wanted)


def test_by_name_beside_a_graft_of_other_blocks():
    model = tiny_dit()
    original = predict(model)
    model.set_graft("self_attention[3]=hyena_x", graft_name="mixer")
    mixer = predict(model)
    model.set_graft("block_pair[0]=parallel", graft_name="pair")
    both = predict(model)
    model.set_active_graft("pair")
    pair = predict(model)
    model.set_active_graft("mixer")
    assert torch.equal(predict(model), mixer)
    model.set_active_graft(["pair", "mixer"])
    assert torch.equal(predict(model), both)
    model.unset_graft("mixer")
    assert torch.equal(predict(model), pair)
    model.unset_graft()
    assert torch.equal(predict(model), original)


@pytest.mark.parametrize("order", [1, -1], ids=["inner first", "outer first"])
def test_by_name_inside_a_block_of_another_is_refused(order):
    model = tiny_dit()
    (first, one), (second, other) = [("inner", "self_attention[1]=hyena_x"), ("outer", "block_pair[0]=parallel")][
        ::order
    ]
    model.set_graft(one, graft_name=first)
    output = predict(model)
    with pytest.raises(StateError, match="'outer' takes transformer_blocks.1.*Put all rules into one plan"):
        model.set_graft(other, graft_name=second)
    assert model.active_grafts() == [first]
    assert torch.equal(predict(model), output)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_stands_by_itself(copied):
    model = tiny_dit()
    original = predict(model)
    model.set_graft(MIXED)
    output, twin = predict(model), copied(model)
    with torch.no_grad():
        for parameter in model.transformer_blocks.parameters():
            parameter.mul_(1.5)
    assert torch.equal(predict(twin), output)
    twin.unset_graft()
    assert torch.equal(predict(twin), original)


def test_closed_form_solves_what_lies_inside_and_says_that_pairs_have_nothing_to_solve():
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, INSIDE))
    config = dg.ClosedFormConfig(steps=2, progress=False)
    reports = dg.closed_form(model, graft, batches(2), config, noise_scheduler=SCHEDULER)
    assert {address.partition("[")[0] for address in reports} == {"self_attention", "feed_forward"}
    assert all(report.relative_error < report.first_error for report in reports.values())
    alone = dg.build_graft(model, dg.plan_graft(model, "block_pair[:]=parallel"))
    with pytest.raises(OperatorError, match="nothing to solve for"):
        dg.closed_form(model, alone, batches(2), config, noise_scheduler=SCHEDULER)


def test_both_stages_by_the_trainer(tmp_path):
    model = tiny_dit(num_layers=2)
    base, original = tensors_of(model), predict(model)
    common = {"steps": 2, "lr": 1e-3, "progress": False}
    arguments = dg.GraftTrainingArguments(
        output_dir=tmp_path / "run",
        distill=dg.DistillConfig(**common),
        finetune=dg.FinetuneConfig(**common),
        per_device_train_batch_size=4,
    )
    trainer = dg.GraftTrainer(
        model=model, plan=INSIDE, args=arguments, train_dataset=batches(4), noise_scheduler=SCHEDULER
    )
    trainer.train()
    assert [row["stage"] for row in model.graft.history] == ["one", "two"]
    comes_back(model, base, tmp_path, original)


def test_the_card_lists_blocks_and_draws_them():
    model = tiny_dit(num_layers=6)
    whole = sum(parameter.numel() for parameter in model.transformer_blocks[0].parameters())
    model.set_graft("block_pair[0]=parallel(merge='sum'); block[2]=remove; block_run[3:5]=parallel(merge='sum')")
    card = dg.card(model)
    sides = "every block keeps its pretrained weights; the merge adds up what they add to their common input"
    assert (
        f"| `block_pair[0]` | 1 | `parallel(merge='sum', residual=True)` | {sides} | {2 * whole:,} | {2 * whole:,} |"
        in card
    )
    assert f"| `block[2]` | 1 | `remove()` | the identity, which is all it is | {whole:,} | 0 |" in card
    assert "| `block_run[3:5]` | 1 |" in card
    assert "block            (██)×(██)·" in card
