"""Blocks side by side, removed and linear in every family of the zoo; those that cannot say why, before anything is
touched.
"""

import pytest
import torch
from safetensors.torch import load_file

import diffusers_graft as dg
from diffusers_graft.errors import OperatorError, RuleError

from ..inspection.models import ROWS, exported, predict, tiny

# Why neighbours do not run side by side.
REFUSED = {
    "HunyuanDiT2DModel": "HunyuanDiTBlock takes a skip connection",
    "CosmosTransformer3DModel": "what CosmosTransformerBlock returns cannot be matched",
    "Cosmos3OmniTransformer": "what Cosmos3VLTextMoTDecoderLayer returns cannot be matched",
    "HiDreamImageTransformer2DModel": "what HiDreamBlock returns cannot be matched",
    "ChromaTransformer2DModel": "each ChromaTransformerBlock is told its own temb",
    "BriaFibo2Transformer2DModel": "each BriaFibo2TransformerBlock is told its own encoder_hidden_states",
    "RFD4ProteinaTransformer": "each RFD4ProteinaTrunkLayer is told its own pairs",
    "LTX2VideoTransformer3DModel": "each LTX2VideoTransformerBlock is told its own perturbation_mask",
    "AceStepTransformer1DModel": "each AceStepTransformerBlock is told its own attention_mask",
    "AnyFlowFARTransformer3DModel": "each AnyFlowTransformerBlock is told its own kv_cache",
    "WanAnimate2Transformer3DModel": "each WanAnimate2TransformerBlock is told its own kv_cache",
    "LatteTransformer3DModel": "temporal_transformer_blocks run between them",
}
NO_BLOCKS = ("CosmosTransformer3DModel", "Cosmos3OmniTransformer", "HiDreamImageTransformer2DModel")
NO_MODELS = ("DualTransformer2DModel",)
FAMILIES = sorted(set(ROWS) & set(exported()) - set(NO_MODELS))
PAIRS = "block_pair[:]=parallel"
OTHERS = "block[0]=linear_block(init='random'); block[1:]=remove"
CASES = [(name, PAIRS) for name in FAMILIES if name not in REFUSED] + [
    (name, OTHERS) for name in FAMILIES if name not in (*NO_BLOCKS, "LTX2VideoTransformer3DModel")
]


@pytest.mark.parametrize(("name", "rules"), CASES, ids=[f"{name}-{rules.split('[')[0]}" for name, rules in CASES])
def test_saved_loaded_and_undone_bit_for_bit(name, rules, tmp_path):
    model = tiny(name)
    original, before = predict(model, name), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.set_graft(rules)
    output = predict(model, name)
    assert output.isfinite().all()
    assert not torch.equal(output, original)
    model.save_graft(tmp_path / "graft")
    model.save_pretrained(tmp_path / "whole")
    model.unset_graft()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(predict(model, name), original)
    model.load_graft(tmp_path / "graft")
    assert torch.equal(predict(model, name), output)
    whole = dg.load_pretrained(tmp_path / "whole")
    assert list(whole.state_dict()) == list(model.state_dict())
    assert torch.equal(predict(whole, name), output)


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
    [
        "FluxTransformer2DModel",
        "SD3Transformer2DModel",
        "WanTransformer3DModel",
        "QwenImage21Transformer2DModel",
        "Kandinsky6Transformer3DModel",
    ],
)
def test_removed_blocks_leave_no_weights_in_files_and_a_config_that_is_true(name, tmp_path):
    model = tiny(name)
    paths = tuple(f"{site.path}." for site in dg.find_sites(model, blocks=True).where(kind="block"))
    base = model.state_dict().keys()
    model.set_graft("block[:]=remove")
    output = predict(model, name)
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
    assert torch.equal(predict(whole, name), output)


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(FAMILIES)))
def test_refused_by_name_before_anything_is_touched(name):
    model = tiny(name)
    modules = dict(model.named_modules())
    run = "block_run[-2:]=parallel" if name == "BriaFibo2Transformer2DModel" else "block_run[0:2]=parallel"
    for rules, error in ((PAIRS, RuleError), (run, RuleError if name in NO_BLOCKS else OperatorError)):
        with pytest.raises(error, match=REFUSED[name]):
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
    model = tiny(name, **settings)
    with pytest.raises(OperatorError, match=words):
        model.set_graft(rules)
    assert model.graft is None
    model.set_graft("block[0]=remove" if "linear" in rules else "block_pair[0]=parallel(merge='sum')")
    assert predict(model, name).isfinite().all()
