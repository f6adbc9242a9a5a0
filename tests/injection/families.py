"""Every transformer class of diffusers, built tiny, and what each test of all of them does."""

import copy
import functools

import torch

import diffusers_graft as dg
from diffusers_graft.inspection import family_of

from ..inspection.models import exported, first, inputs_of, predict, tiny

MIXERS = {
    "sliding_window": {"operator": "sliding_window", "window": (1, 1)},
    "linear_attention": "linear_attention",
    "hyena_x": "hyena_x",
}


NO_MODEL = {"DualTransformer2DModel": "it is no ModelMixin: graft the two Transformer2DModel in its `transformers`"}


NO_SOFTMAX = {
    "AnyFlowFARTransformer3DModel": "its self-attention runs under a flex BlockMask",
    "Kandinsky6SRTransformer3DModel": "its self-attention runs under a flex BlockMask",
}


LINEAR = {
    "SanaTransformer2DModel": "its self-attention is a linear one: the control is its own kernel",
    "SanaVideoTransformer3DModel": "the same, under rotary embeddings that follow the kernel",
}


NO_MAIN_SITE = {"SanaWMTransformer3DModel": "its self-attention is its own module without a processor"}


NAMES = sorted(set(exported()) - set(NO_MODEL))


FEED_FORWARD = {"operator": "mlp", "init": "random", "activation": "gelu", "expansion": 1}


@functools.cache
def built(name):
    return tiny(name)


def model_of(name):
    return copy.deepcopy(built(name))


def main_sites(model):
    """The self- and joint-attention that runs on the image, and in this forward."""
    aside, called = family_of(model).aside, set()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        for path, module in model.named_modules()
    ]
    predict(model, type(model).__name__)
    for handle in handles:
        handle.remove()
    kinds = ("joint_attention", "self_attention")
    found = [site for site in dg.find_sites(model) if site.kind in kinds and site.path in called]
    return [site for site in found if not site.path.startswith(aside)] if aside else found


def rules_for(model, spec):
    return {site.address: spec for site in main_sites(model)}


def run_grafted(model, rules):
    model.set_graft(rules)
    return predict(model, type(model).__name__)


def same(model, keys, output):
    assert list(model.state_dict()) == keys
    assert torch.equal(predict(model, type(model).__name__), output)


def learn_and_share(model, name, folder, *, trains=True):
    one_step(model, inputs_of(name), trains=trains)
    same_after_a_round(model, model_of(name), folder, lambda model: predict(model, name))


def one_step(model, inputs, *, trains=True):
    own = list(model.graft.tensors(model).values())
    trained = [parameter for parameter in own if parameter.requires_grad] or [
        parameter for seat in model.graft.seats.values() for parameter in seat.parameters() if parameter.requires_grad
    ]
    if trains:
        first(model(**inputs)).square().mean().backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
        with torch.no_grad():
            for parameter in own:
                if parameter.requires_grad and parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        model.zero_grad()


def same_after_a_round(model, other, folder, predict):
    """Through a folder to another copy of the base."""
    grafted = predict(model)
    assert grafted.isfinite().all()
    model.save_graft(folder)
    other.load_graft(folder)
    assert torch.equal(predict(other), grafted)
