"""What find_sites reads without running a model is what a forward shows."""

import inspect
from dataclasses import dataclass

import pytest
import torch
from diffusers import FluxTransformer2DModel, ModelMixin

import diffusers_graft as dg
from diffusers_graft.errors import ModelError

from ..injection.families import NAMES, NO_SOFTMAX
from ..models import tiny_dit, tiny_pixart
from .models import exported, first, predict, tiny

# The order of a few parts depends on the arguments of a forward, not on the source alone.
REORDERED = {
    "WanAnimateTransformer3DModel": "a face adapter runs between the blocks",
    "Flux3Transformer2DModel": "one list for each mode",
}
JOINT = {
    True: "Flux Flux2 Chroma Bria BriaFibo AuraFlow CogVideoX CogView3Plus CogView4 ConsisID EasyAnimate GlmImage LongCatImage OvisImage QwenImage",
    False: "SD3 HiDreamImage HunyuanVideo HunyuanVideo15 HunyuanVideoFramepack HunyuanImage JoyImageEdit JoyImageEditPlus MotifVideo",
}


def watch(model, name):
    """How each attention is called in one forward: (image tokens, tokens of the second sequence or None), in order."""
    calls = {}

    def hook(module, args, kwargs, path, names):
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden = given.get("hidden_states", given.get(names[0]))
        other = next(
            (
                given[key]
                for key in given
                if ("encoder" in key and key.endswith("hidden_states"))
                or key in ("context", "gen_seq", "cond", "motion_vec")
            ),
            None,
        )
        calls.setdefault(path, None if other is None or other is hidden else other.shape[-2])

    for site in dg.find_sites(model):
        if site.kind != "feed_forward":
            module = model.get_submodule(site.path)
            names = list(inspect.signature(module.forward).parameters)
            module.register_forward_pre_hook(
                lambda module, args, kwargs, path=site.path, names=names: hook(module, args, kwargs, path, names),
                with_kwargs=True,
            )
    predict(model, name)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_kinds_and_order_are_those_of_a_forward(name):
    model = tiny(name)
    sites = [site for site in dg.find_sites(model) if site.kind != "feed_forward"]
    calls = watch(model, name)
    called = [site for site in sites if site.path in calls]
    for site in called:
        assert (site.kind == "self_attention") == (calls[site.path] is None), site
    if name not in REORDERED:
        assert [site.path for site in called] == list(calls), "sites are in forward order"


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(NO_SOFTMAX)))
def test_sizes_are_those_the_operator_is_given(name):
    """Heads and head width of queries, keys and values; grouped heads arrive repeated."""
    model, seen = tiny(name), {}
    model.set_graft(
        {
            f"{kind}[:]": "self_attention"
            for kind in ("self_attention", "joint_attention", "cross_attention")
            if dg.find_sites(model).where(kind=kind)
        }
    )

    def hook(operator, args):
        seen[operator] = [part.shape for part in args[:3]]

    for seat in model.graft.seats.values():
        seat.graft.register_forward_pre_hook(hook)
    predict(model, name)
    for operator, shapes in seen.items():
        for shape in shapes:
            assert (shape[1], shape[3]) == (operator.site.heads, operator.site.head_width), operator.site


@pytest.mark.parametrize("first_in_sequence", JOINT)
def test_joint_processors_show_whether_the_prompt_comes_first(first_in_sequence):
    from diffusers_graft.inspection.source import text_comes_first

    for family in JOINT[first_in_sequence].split():
        name = next((name for name in exported() if name.startswith(f"{family}Transformer")), None)
        if name is not None:
            model = tiny(name)
            site = dg.find_sites(model).where(kind="joint_attention")[0]
            assert text_comes_first(type(model.get_submodule(site.path).processor)) is first_in_sequence, name


@pytest.mark.parametrize("name", NAMES)
def test_a_class_that_nobody_listed_is_read_at_its_full_size(name):
    """By its default configuration, on the meta device: sites are found, and mixers are built for all that have a
    softmax.
    """
    with torch.device("meta"):
        try:
            model = exported()[name]()
        except (TypeError, ValueError, ZeroDivisionError, RuntimeError):
            return  # no default configuration
    sites = dg.find_sites(model)
    kind = next((kind for kind in ("joint_attention", "self_attention") if sites.where(kind=kind)), None)
    if kind is None or name in NO_SOFTMAX:
        return
    model.set_graft({f"{kind}[:]": "hyena_x"})
    assert all(
        parameter.is_meta for operator in model.graft.operators().values() for parameter in operator.parameters()
    )


INLINE = {
    (
        "proj_mlp",
        "proj_out",
    ): "Bria BriaFibo Chroma Flux HunyuanImage HunyuanVideo HunyuanVideoFramepack LongCatImage MotifVideo OvisImage",
    ("to_qkv_mlp_proj", "to_out"): "Flux2",
    ("gate_proj", "up_proj", "down_proj"): "PRX MiniMaxMusic3RVQDepthDecoder",
    ("ff_in", "ff_out"): "MiniMaxMusic3",
}


@pytest.mark.parametrize("name", NAMES)
def test_inline_feed_forwards_are_named_and_no_site(name):
    model = tiny(name)
    sites = dg.find_sites(model)
    families = {family: layers for layers, names in INLINE.items() for family in names.split()}
    layers = families.get(name.partition("Transformer")[0])
    if layers is None:
        assert sites.notes == ()
        return
    (note,) = sites.notes
    assert f"inline ({', '.join(layers)}), which is no site" in note
    assert str(sites).endswith(note)
    assert not any(site.path.endswith(layers) for site in sites)
    owner, count = note.partition(":")[0].split(" x ")
    assert sum(type(module).__name__ == owner for module in model.modules()) == int(count)


def test_notes_are_the_same_before_and_after_grafting():
    model = tiny("Flux2Transformer2DModel")
    before = dg.find_sites(model)
    model.set_graft({"self_attention[:]": "hyena_x", "joint_attention[0]": "neighborhood"})
    assert dg.find_sites(model).notes == before.notes


class Stranger(ModelMixin):
    """A model of nobody's table: another author's attention and feed-forward, in blocks of their own."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([StrangeBlock() for _ in range(2)])

    def forward(self, states, return_dict=True):
        for block in self.blocks:
            states = block(states)
        return (states,)


def test_parts_that_nothing_calls_are_no_sites():
    name = "SanaWMLTX2RefinerTransformer3DModel"
    if name not in exported():
        pytest.skip(f"this diffusers has no {name}")
    model = tiny(name)
    assert hasattr(model.transformer_blocks[0], "audio_attn1")
    assert {site.path.rpartition(".")[2] for site in dg.find_sites(model)} == {"attn1", "attn2", "ff"}


class StrangeProcessor:
    def __call__(self, attn, states):
        query, key, value = (layer(states).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (attn.a, attn.b, attn.c))
        return attn.d(torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class StrangeAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.processor = 2, StrangeProcessor()
        self.a, self.b, self.c, self.d = (torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, states):
        return self.processor(self, states)


class StrangeBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mixes, self.thinks = (
            StrangeAttention(),
            torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.SiLU(), torch.nn.Linear(12, 8)),
        )

    def forward(self, states):
        states = states + self.mixes(states)
        return states + self.thinks(states)


def test_a_model_class_of_another_package_takes_grafts_too():
    torch.manual_seed(0)
    model, states = Stranger().eval(), torch.randn(2, 9, 8)
    sites = dg.find_sites(model)
    attention = {"kind": "self_attention", "path": "blocks.0.mixes", "width": 8, "heads": 2, "head_width": 4}
    feed_forward = {"kind": "feed_forward", "path": "blocks.0.thinks", "width": 8, "hidden": 12}
    assert list(sites[:2]) == [
        dg.Site(index=0, **attention),
        dg.Site(index=0, **feed_forward, activation="Sequential"),
    ]
    before = first(model(states))
    model.set_graft({"self_attention[:]": "self_attention"})
    assert torch.equal(first(model(states)), before)
    model.unset_graft()
    model.set_graft(
        {
            "self_attention[:]": "sliding_window",
            "feed_forward[0]": {"operator": "mlp", "init": "random", "activation": "gelu", "expansion": 2},
        }
    )
    assert not torch.equal(first(model(states)), before)
    model.unset_graft()
    assert torch.equal(first(model(states)), before)


def test_sites_of_a_dit():
    sites = dg.find_sites(tiny_dit())
    assert [site.address for site in sites[:3]] == ["self_attention[0]", "feed_forward[0]", "self_attention[1]"]
    first = sites.where(kind="self_attention")[0]
    assert (first.path, first.width, first.heads, first.head_width) == ("transformer_blocks.0.attn1", 16, 2, 8)
    assert sites.where(kind="feed_forward")[3].hidden == 64
    assert len(sites.where(kind="self_attention")[1::2]) == 2
    assert "transformer_blocks.3.ff" in str(sites)


def test_sites_of_a_pixart_include_cross_attention():
    kinds = [site.kind for site in dg.find_sites(tiny_pixart(num_layers=1))]
    assert kinds == ["self_attention", "cross_attention", "feed_forward"]


def test_sites_are_the_same_before_and_after_grafting():
    model = tiny_dit()
    before = dg.find_sites(model)
    model.set_graft({"self_attention[0]": "hyena_x", "feed_forward[0]": "mlp"})
    assert dg.find_sites(model) == before


def test_what_is_no_model_is_refused_and_one_on_meta_is_read():
    with pytest.raises(ModelError, match="got Linear"):
        dg.find_sites(torch.nn.Linear(2, 2))

    @dataclass
    class Pipeline:
        components = {"transformer": tiny_dit()}  # noqa: RUF012

    with pytest.raises(ModelError, match="pass its transformer"):
        dg.find_sites(Pipeline())
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2)
    assert [site.kind for site in dg.find_sites(flux)] == [
        "joint_attention",
        "feed_forward",
        "feed_forward",
        "self_attention",
    ]
