"""LoRA of diffusers and peft, loaded before a graft and over it."""

import pytest
import torch
from peft import LoraConfig

from diffusers_graft.errors import OperatorError

from ..inspection.models import predict, tiny
from .flux import FLUX


def test_lora_loaded_before_a_graft_stays():

    model = tiny(FLUX)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "proj"], init_lora_weights=False))
    adapted, keys = predict(model, FLUX), list(model.state_dict())
    model.set_graft({"joint_attention[:]": "self_attention", "self_attention[:]": "self_attention"})
    assert torch.equal(predict(model, FLUX), adapted)
    model.unset_graft()
    model.set_graft({"joint_attention[:]": "neighborhood", "self_attention[:]": "hyena_x"})
    assert not torch.equal(predict(model, FLUX), adapted)
    model.unset_graft()
    assert torch.equal(predict(model, FLUX), adapted)
    assert list(model.state_dict()) == keys


def test_lora_loaded_over_a_graft_is_there_without_it_too():

    model, adapted = tiny(FLUX), tiny(FLUX)
    plain, lora = predict(model, FLUX), LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.set_graft({"joint_attention[:]": "self_attention"})
    for one in (model, adapted):
        torch.manual_seed(0)
        one.add_adapter(lora)
    expected = predict(adapted, FLUX)
    for verb in (model.disable_graft, model.enable_graft):
        verb()
        assert torch.equal(predict(model, FLUX), expected)
    model.unload_lora()
    for verb in (model.disable_graft, model.enable_graft):
        verb()
        assert torch.equal(predict(model, FLUX), plain)


def test_nothing_starts_from_layers_that_carry_lora():

    model = tiny(FLUX)
    model.add_adapter(LoraConfig(r=2, target_modules=["ff.net.0.proj"], init_lora_weights=False))
    with pytest.raises(OperatorError, match="Fuse LoRA into the weights first"):
        model.set_graft({"feed_forward[:]": "mlp"})
    model.set_graft({"feed_forward[:]": {"operator": "mlp", "init": "random"}})


LORA = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "proj_out", "net.2"], "init_lora_weights": False}
WAITING = {
    "feed-forwards": {"feed_forward[:]": {"operator": "mlp", "init": "random"}},
    "a block that is gone": {"block[0]": "remove"},
    "an attention that starts anew": {"self_attention[0]": {"operator": "neighborhood", "init": "random"}},
}


def adapted():
    torch.manual_seed(4)
    model = tiny(FLUX)
    model.add_adapter(LoraConfig(**LORA), adapter_name="a")
    return model


def forget(model):
    model.delete_adapters("a")


def fuse(model):
    model.fuse_lora(lora_scale=0.5)


def fuse_and_unload(model):
    model.fuse_lora(lora_scale=0.5)
    model.unload_lora()


def fuse_and_unfuse(model):
    model.fuse_lora()
    model.unfuse_lora()


VERBS = [
    lambda model: model.unload_lora(),
    lambda model: model.set_adapters(["a"], [0.3]),
    lambda model: model.disable_lora(),
    forget,
    fuse,
    fuse_and_unload,
    fuse_and_unfuse,
]
NAMES = ["unloaded", "weakened", "disabled", "deleted", "fused", "fused and unloaded", "fused and unfused"]


@pytest.mark.parametrize("verb", VERBS, ids=NAMES)
def test_a_verb_reaches_originals_that_wait(verb):
    plain = adapted()
    verb(plain)
    wanted = predict(plain, FLUX)
    for rules in WAITING.values():
        model = adapted()
        model.set_graft(rules)
        verb(model)
        assert predict(model, FLUX).isfinite().all()
        model.unset_graft()
        torch.testing.assert_close(predict(model, FLUX), wanted, rtol=1e-5, atol=1e-6)
        assert {*model.state_dict()} == {*plain.state_dict()}


def lora_tensors(targets):
    """The tensors of a LoRA, as a file holds them."""
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(4)
    model = tiny(FLUX)
    model.add_adapter(LoraConfig(**{**LORA, "target_modules": targets}))
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("targets", [["to_q", "net.2"], ["net.2", "net.0.proj"]], ids=["some wait", "all wait"])
def test_lora_loaded_over_a_graft_reaches_the_parts_it_replaced(targets):
    tensors = lora_tensors(targets)
    plain = tiny(FLUX)
    unadapted = predict(plain, FLUX)
    plain.load_lora_adapter(dict(tensors), prefix=None, adapter_name="a")
    wanted = predict(plain, FLUX)
    for rules in (WAITING["feed-forwards"], WAITING["a block that is gone"]):
        model = tiny(FLUX)
        model.set_graft(rules)
        model.load_lora_adapter(dict(tensors), prefix=None, adapter_name="a")
        model.disable_graft()
        assert torch.equal(predict(model, FLUX), wanted)
        assert list(model.peft_config) == ["a"]
        model.enable_graft()
        model.unload_lora()
        model.unset_graft()
        assert torch.equal(predict(model, FLUX), unadapted)


def test_a_verb_reaches_seats_that_wait():
    model = tiny(FLUX)
    model.set_graft(WAITING["an attention that starts anew"])
    grafted = predict(model, FLUX)
    model.add_adapter(LoraConfig(**LORA))
    assert not torch.equal(predict(model, FLUX), grafted)
    model.disable_graft()
    model.unload_lora()
    model.enable_graft()
    assert torch.equal(predict(model, FLUX), grafted)
    assert not any("lora" in name for name in model.state_dict())


def test_torchs_generator_does_not_depend_on_parts_that_wait():
    states = []
    for rules in (None, WAITING["feed-forwards"]):
        model = tiny(FLUX)
        if rules:
            model.set_graft(rules)
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
