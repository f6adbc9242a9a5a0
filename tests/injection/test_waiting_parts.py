"""Parts that wait off the tree come back in step with the model."""

import copy

import pytest
import torch

from diffusers_graft.errors import StateError

from ..inspection.models import predict as predict_in_zoo
from ..inspection.models import tiny
from ..models import predict, same_tensors, tensors_of, tiny_dit
from .flux import FLUX


def test_parts_that_wait_follow_the_model():
    model = tiny_dit()
    plain = copy.deepcopy(model).to(torch.bfloat16)
    model.set_graft({"self_attention[:]": {"operator": "hyena_x", "init": "random"}, "feed_forward[0]": "mlp"})
    model.to(torch.bfloat16)
    model.unset_graft()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(predict(model), predict(plain))


def test_a_removed_block_follows_the_model():
    model = tiny_dit()
    plain = copy.deepcopy(model).to(torch.bfloat16)
    model.set_graft("block[1:]=remove")
    model.to(torch.bfloat16)
    model.unset_graft()
    assert torch.equal(predict(model), predict(plain))


@pytest.mark.parametrize(
    "rules", ["block[0]=linear_block", "block[:]=remove", "self_attention[0]=mamba2", "feed_forward[0]=mlp"]
)
def test_parameters_of_several_dtypes_keep_theirs(rules):
    model = tiny_dit().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("to_k.weight", "net.2.bias", "norm1.linear.bias")):
            parameter.data = parameter.data.float() + 1e-5
    before = tensors_of(model)
    model.set_graft(rules)
    model.unset_graft()
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: t.dtype for name, t in before.items()
    }
    assert same_tensors(model, before)


def test_parts_that_wait_are_not_stored_as_their_trained_copies_are():
    model = tiny(FLUX).to(torch.bfloat16)
    model.set_graft({"joint_attention[0]": "neighborhood"})
    model.graft.untie("transformer_blocks.0.attn")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    model.unset_graft()
    assert {parameter.dtype for parameter in model.transformer_blocks[0].attn.parameters()} == {torch.bfloat16}


def test_quantised_projections_are_called_and_never_read():
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    model = tiny(FLUX)
    torchao.quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda module, path: path.endswith(("to_q", "to_k", "to_v"))
    )
    quantised = predict_in_zoo(model, FLUX)
    model.set_graft({"joint_attention[:]": "self_attention", "self_attention[:]": "self_attention"})
    assert torch.equal(predict_in_zoo(model, FLUX), quantised)
    model.unset_graft()
    model.set_graft({"joint_attention[:]": "neighborhood", "self_attention[:]": "hyena_x"})
    assert predict_in_zoo(model, FLUX).isfinite().all()


@pytest.mark.parametrize("rules", ["block[1:]=remove", "feed_forward[:]=mlp(expansion=3)", "self_attention[0]=mamba2"])
def test_a_model_frozen_as_one_has_no_trainable_part_left(rules):
    model = tiny_dit()
    model.set_graft(rules)
    model.requires_grad_(False)
    graft = model.unset_graft()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    model.set_graft(graft)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parts_that_are_trained_by_themselves_stay_so():
    model = tiny_dit()
    model.set_graft("feed_forward[0]=mlp(expansion=3)")
    model.transformer_blocks[1].requires_grad_(False)
    model.unset_graft()
    assert all(parameter.requires_grad for parameter in model.transformer_blocks[0].ff.parameters())


class Quantised(torch.Tensor):
    """A weight in a form of its own, as libraries for quantisation make them."""


def test_originals_do_not_come_back_in_full_precision_to_a_model_quantised_meanwhile():
    model = tiny_dit()
    before = tensors_of(model)
    model.set_graft("feed_forward[0]=mlp(expansion=3)")
    layer = model.transformer_blocks[2].ff.net[2]
    weight = layer.weight
    layer.weight = torch.nn.Parameter(weight.detach().as_subclass(Quantised), requires_grad=False)
    for verb in (model.disable_graft, model.unset_graft):
        with pytest.raises(StateError, match=r"was quantised .transformer_blocks.2.ff.net.2.weight"):
            verb()
    assert model.graft is not None
    layer.weight = weight
    model.unset_graft()
    assert same_tensors(model, before)


def test_new_parts_compute_in_the_dtype_of_most_weights():
    """Wan keeps its first parameter, a table, in float32, and runs in bfloat16."""
    model = tiny("WanTransformer3DModel").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "scale_shift_table" in name or ".norm2." in name:
            parameter.data = parameter.data.float()
    model.set_graft({"block_pair[0]": "parallel", "feed_forward[0]": {"operator": "mlp", "expansion": 2}})
    assert {parameter.dtype for name, parameter in model.named_parameters() if ".graft." in name} == {torch.bfloat16}
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if ".graft." not in name}
    model.unset_graft()
    assert dtypes.items() <= {name: parameter.dtype for name, parameter in model.named_parameters()}.items()


def test_parts_of_a_quantised_base_start_and_train_in_full_precision():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tiny_dit()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    plain = predict(model)
    for init in ("warm", "random"):
        model.set_graft({"self_attention[0]": {"operator": "hyena_x", "init": init}, "feed_forward[1]": "mlp"})
        model.graft.untie("transformer_blocks.0.attn1")
        weight = model.transformer_blocks[0].attn1.to_q.weight
        assert type(weight.data) is torch.Tensor
        assert predict(model).isfinite().all()
        model.unset_graft()
        assert torch.equal(predict(model), plain)


def test_originals_have_the_attention_backend_that_the_model_has():
    model = tiny(FLUX)
    model.set_graft({"joint_attention[:]": "linear_attention"})
    try:
        model.set_attention_backend("native")
        model.unset_graft()
        assert model.transformer_blocks[0].attn.processor._attention_backend == "native"
        model.set_graft({"joint_attention[:]": "linear_attention"})
        model.reset_attention_backend()
        model.disable_graft()
        assert model.transformer_blocks[0].attn.processor._attention_backend is None
    finally:
        model.reset_attention_backend()
