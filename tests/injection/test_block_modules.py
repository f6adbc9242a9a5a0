"""Blocks side by side, removed, or linear: what they compute, in every family, and together with everything else."""

import copy
import pickle
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft.errors import OperatorError, RuleError, StateError
from diffusers_graft.evaluation.cost import count_depth, count_parameters

from ..inspection.models import ROWS, exported, inputs_of, tiny
from ..inspection.models import predict as predict_in_zoo
from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit

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
        ("block_run[0,2]=parallel", RuleError, "is not a run"),
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


# Why neighbours do not run side by side.
REFUSED_FAMILIES = {
    "HunyuanDiT2DModel": "HunyuanDiTBlock takes a skip connection",
    "CosmosTransformer3DModel": "what CosmosTransformerBlock returns cannot be matched",
    "Cosmos3OmniTransformer": "what Cosmos3VLTextMoTDecoderLayer returns cannot be matched",
    "HiDreamImageTransformer2DModel": "what HiDreamBlock returns cannot be matched",
    "ChromaTransformer2DModel": "each ChromaTransformerBlock gets its own temb",
    "BriaFibo2Transformer2DModel": "each BriaFibo2TransformerBlock gets its own encoder_hidden_states",
    "RFD4ProteinaTransformer": "each RFD4ProteinaTrunkLayer gets its own pairs",
    "LTX2VideoTransformer3DModel": "each LTX2VideoTransformerBlock gets its own perturbation_mask",
    "AceStepTransformer1DModel": "each AceStepTransformerBlock gets its own attention_mask",
    "AnyFlowFARTransformer3DModel": "each AnyFlowTransformerBlock gets its own kv_cache",
    "WanAnimate2Transformer3DModel": "each WanAnimate2TransformerBlock gets its own kv_cache",
    "LatteTransformer3DModel": "temporal_transformer_blocks run between them",
}


NO_BLOCKS = ("CosmosTransformer3DModel", "Cosmos3OmniTransformer", "HiDreamImageTransformer2DModel")


NO_MODELS = ("DualTransformer2DModel",)


FAMILIES = sorted(set(ROWS) & set(exported()) - set(NO_MODELS))


PAIRS = "block_pair[:]=parallel"


OTHERS = "block[0]=linear_block(init='random'); block[1:]=remove"


FAMILY_CASES = [(name, PAIRS) for name in FAMILIES if name not in REFUSED_FAMILIES] + [
    (name, OTHERS) for name in FAMILIES if name not in (*NO_BLOCKS, "LTX2VideoTransformer3DModel")
]


@pytest.mark.parametrize(
    ("name", "rules"), FAMILY_CASES, ids=[f"{name}-{rules.split('[')[0]}" for name, rules in FAMILY_CASES]
)
def test_every_family_is_saved_loaded_and_undone_bit_for_bit(name, rules, tmp_path):
    model = tiny(name)
    original, before = predict_in_zoo(model, name), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_graft(rules)
    output = predict_in_zoo(model, name)
    assert output.isfinite().all()
    assert not torch.equal(output, original)
    model.save_graft(tmp_path / "graft")
    model.save_pretrained(tmp_path / "whole")
    model.unset_graft()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(predict_in_zoo(model, name), original)
    model.load_graft(tmp_path / "graft")
    assert torch.equal(predict_in_zoo(model, name), output)
    whole = dg.load_pretrained(tmp_path / "whole")
    assert list(whole.state_dict()) == list(model.state_dict())
    assert torch.equal(predict_in_zoo(whole, name), output)


@torch.no_grad()
def test_both_streams_of_a_pair_add_up_what_both_blocks_add():
    model = tiny("SD3Transformer2DModel")
    first, second = model.transformer_blocks[:2]
    image, text, temb = torch.randn(2, 6, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
    answers = [block(image, text, temb) for block in (first, second)]
    wanted = [
        sum(answer[number] - stream for answer in answers) + stream for number, stream in enumerate((text, image))
    ]
    model.set_graft("block_pair[0]=parallel")
    one, other = model.transformer_blocks[:2]
    text_out, image_out = one(image, text, temb)
    for made, sum_of_both in zip(other(image_out, text_out, temb), wanted, strict=True):
        torch.testing.assert_close(made, sum_of_both)


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            "FluxTransformer2DModel",
            "SD3Transformer2DModel",
            "WanTransformer3DModel",
            "QwenImage21Transformer2DModel",
            "Kandinsky6Transformer3DModel",
        }
        & set(exported())
    ),
)
def test_removed_blocks_leave_no_weights_in_files_and_a_config_that_is_true(name, tmp_path):
    model = tiny(name)
    paths = tuple(f"{site.path}." for site in dg.find_sites(model, blocks=True).where(kind="block"))
    base = model.state_dict().keys()
    model.set_graft("block[:]=remove")
    output = predict_in_zoo(model, name)
    model.save_graft(tmp_path / "graft")
    model.save_pretrained(tmp_path / "whole")
    saved = load_file(tmp_path / "whole" / "diffusion_pytorch_model.safetensors")
    assert not [key for key in saved if key.startswith(paths)]
    assert saved.keys() == model.state_dict().keys()
    assert not load_file(tmp_path / "graft" / "graft_model.safetensors")
    whole = type(model).from_pretrained(tmp_path / "whole")
    assert whole.state_dict().keys() == saved.keys()
    assert (
        type(model).from_config(whole.config).state_dict().keys() == base
    )  # the config is the base's, the edits are beside it
    assert [edit.config.owner.name for edit in whole.graft.plan.edits] == ["remove"] * len(paths)
    assert torch.equal(predict_in_zoo(whole, name), output)


@pytest.mark.parametrize("name", sorted(set(REFUSED_FAMILIES) & set(FAMILIES)))
def test_refused_by_name_before_anything_is_touched(name):
    if name == "CosmosTransformer3DModel" and Version(version("diffusers")) < Version("0.40"):
        pytest.skip("blocks of this version can run side by side")
    model = tiny(name)
    modules = dict(model.named_modules())
    run = "block_run[-2:]=parallel" if name == "BriaFibo2Transformer2DModel" else "block_run[0:2]=parallel"
    for rules, error in ((PAIRS, RuleError), (run, RuleError if name in NO_BLOCKS else OperatorError)):
        with pytest.raises(error, match=REFUSED_FAMILIES[name]):
            model.set_graft(rules)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize(
    ("name", "settings", "rules", "words"),
    [
        ("LTX2VideoTransformer3DModel", {}, "block[0]=linear_block", r"carries streams of widths \[8, 16\]"),
        (
            "MochiTransformer3DModel",
            {"num_layers": 3, "pooled_projection_dim": 8},
            "block_pair[0]=parallel",
            "parallel\\(merge='sum'",
        ),
    ],
    ids=["ltx2", "mochi"],
)
def test_streams_of_different_widths_take_what_has_no_weights(name, settings, rules, words):
    if name not in exported():
        pytest.skip(f"this diffusers has no {name}")
    model = tiny(name, **settings)
    with pytest.raises(OperatorError, match=words):
        model.set_graft(rules)
    assert model.graft is None
    model.set_graft("block[0]=remove" if "linear" in rules else "block_pair[0]=parallel(merge='sum')")
    assert predict_in_zoo(model, name).isfinite().all()


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
    with pytest.raises(StateError, match="'outer' replaces transformer_blocks.1.*Put all rules into one plan"):
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


def test_caches_of_diffusers_know_a_removed_block_as_the_block_it_was():
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks._helpers import TransformerBlockRegistry

    model = tiny("FluxTransformer2DModel")
    original = TransformerBlockRegistry.get(type(model.transformer_blocks[1]))
    model.set_graft("block[1]=remove; block[2]=linear_block")
    output = predict_in_zoo(model, "FluxTransformer2DModel")
    metadata = TransformerBlockRegistry.get(type(model.transformer_blocks[1]))
    assert metadata.return_hidden_states_index == original.return_hidden_states_index
    twin = pickle.loads(pickle.dumps(model.transformer_blocks[1]))
    assert type(twin) is type(model.transformer_blocks[1])
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("one"):
        torch.testing.assert_close(predict_in_zoo(model, "FluxTransformer2DModel"), output)
