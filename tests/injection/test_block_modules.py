"""Blocks side by side, removed, or linear: what they compute, and that they come and go without a trace."""

import pytest
import torch
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft.errors import OperatorError, RuleError
from diffusers_graft.evaluation.cost import count_depth, count_parameters

from ..models import predict, same_tensors, tensors_of, tiny_dit

RULES = [
    "block_pair[:]=parallel",
    "block_pair[:]=parallel(merge='sum')",
    "block_pair[1]=parallel(merge='gated')",
    "block_pair[:]=parallel(init='random')",
    "block_pair[:]=parallel(residual=False)",
    "block[0]=remove; block_pair[1]=parallel",
    "block_pair[0]=remove",
    "block_run[0:4]=parallel(group=2)",
    "block_run[:]=parallel",
    "block_run[1:3]=parallel",
    "block[1]=linear_block",
    "block_run[1:4]=linear_block(init='random')",
    "self_attention[:]=hyena_x; feed_forward[1]=mlp(expansion=3); block_pair[:]=parallel",
    "self_attention[0]=hyena_x; block[2]=remove",
]


@pytest.mark.parametrize("rules", RULES)
def test_installed_saved_loaded_and_undone_bit_for_bit(rules, tmp_path):
    model = tiny_dit()
    before, original, sites = tensors_of(model), predict(model), dg.find_sites(model, blocks=True)
    model.set_graft(rules)
    output = predict(model)
    assert output.isfinite().all()
    assert not torch.equal(output, original)
    assert dg.find_sites(model, blocks=True) == sites
    model.save_graft(tmp_path / "graft")
    model.save_pretrained(tmp_path / "whole")
    model.disable_graft()
    assert torch.equal(predict(model), original)
    model.enable_graft()
    assert torch.equal(predict(model), output)
    model.unset_graft()
    assert same_tensors(model, before)
    assert torch.equal(predict(model), original)
    model.load_graft(tmp_path / "graft")
    assert torch.equal(predict(model), output)
    assert torch.equal(predict(dg.load_pretrained(tmp_path / "whole")), output)


def test_linear_starts_as_the_sum_to_the_last_bit():
    outputs = []
    for merge in ("sum", "linear", "gated"):
        model = tiny_dit()
        model.set_graft(f"block_pair[:]=parallel(merge={merge!r})")
        outputs.append(predict(model))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
def test_a_pair_adds_up_what_both_blocks_add_to_one_input():
    model = tiny_dit(num_layers=2)
    first, second = model.transformer_blocks
    arguments = {"timestep": torch.tensor([3, 4]), "class_labels": torch.tensor([1, 2])}
    hidden = torch.randn(2, 16, 16)
    wanted = first(hidden, **arguments) + second(hidden, **arguments) - hidden
    model.set_graft("block_pair[:]=parallel")
    one, other = model.transformer_blocks
    assert torch.allclose(other(one(hidden, **arguments), **arguments), wanted, atol=1e-6)


@torch.no_grad()
def test_blocks_that_are_told_different_things_are_noticed_in_the_first_forward():
    model = tiny_dit(num_layers=2)
    model.set_graft("block_pair[:]=parallel")
    one, other = model.transformer_blocks
    told = {"timestep": torch.tensor([3, 4]), "class_labels": torch.tensor([1, 2])}
    hidden = one(torch.randn(2, 16, 16), **told)
    with pytest.raises(OperatorError, match="takes its own timestep"):
        other(hidden, **{**told, "timestep": torch.tensor([3, 5])})


def test_removed_blocks_leave_no_weights_but_what_the_model_reads(tmp_path):
    model = tiny_dit()
    model.set_graft("block[0,2]=remove")
    model.save_pretrained(tmp_path / "whole")
    model.save_graft(tmp_path / "graft")
    saved = load_file(tmp_path / "whole" / "diffusion_pytorch_model.safetensors")
    left = [name for name in saved if name.startswith(("transformer_blocks.0.", "transformer_blocks.2."))]
    assert left
    assert all(name.startswith("transformer_blocks.0.norm1.emb.") for name in left)
    assert not load_file(tmp_path / "graft" / "graft_model.safetensors")
    loaded = dg.load_pretrained(tmp_path / "whole")
    assert loaded.config.num_layers == len(loaded.transformer_blocks) == 4


def test_a_plan_of_blocks_comes_back_from_its_file(tmp_path):
    model = tiny_dit()
    plan = dg.plan_graft(model, "self_attention[::2]=hyena_x; block_run[0:4]=parallel(group=2)")
    plan.save(tmp_path / "plan.json")
    assert dg.GraftPlan.load(tmp_path / "plan.json") == plan
    assert [edit.site.address for edit in plan.edits][-2:] == ["block_run[0:2]", "block_run[2:4]"]


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ("block_pair[0]=parallel; block[1]=remove", RuleError, "Two edits replace transformer_blocks.1"),
        ("self_attention[1]=hyena_x; block[1]=remove", RuleError, "lies inside"),
        ("block_run[0,2]=parallel", RuleError, "is no run"),
        ("block_run[0:3]=parallel(group=2)", RuleError, "do not divide"),
        ("block_run[1:2]=parallel", OperatorError, r"two blocks or more side by side; block_run\[1:2\] is one"),
        ("block[0]=parallel", OperatorError, "is one"),
        ("block_pair[0]=linear_mlp", OperatorError, "linear_mlp replaces feed_forward"),
    ],
)
def test_refused_with_words_and_nothing_touched(rules, error, words):
    model = tiny_dit()
    before = tensors_of(model)
    with pytest.raises(error, match=words):
        model.set_graft(rules)
    assert same_tensors(model, before)


def test_the_papers_parameter_count():
    """712,304,672 as the paper's DiT counts: one embedder for all blocks where diffusers has one in each, a table of
    positions that diffusers computes, and variances."""
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        model = DiTTransformer2DModel(out_channels=8)
    embedder = sum(p.numel() for p in model.transformer_blocks[0].norm1.emb.parameters())
    more = 256 * 1152 - 27 * embedder
    assert count_parameters(model) + more == 675_129_632
    model.set_graft({"block_pair[:]": "parallel"})
    assert count_parameters(model) + more == 712_304_672
    assert count_depth(model) == 14
