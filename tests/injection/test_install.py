"""In and out again, bit for bit."""

import copy
import pickle
import threading

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import diffusers_graft as dg
from diffusers_graft.errors import GeometryError, GraftError, ModelError, StateError
from diffusers_graft.inspection import example_inputs

from ..inspection.models import exported, first, inputs_of, tiny
from ..inspection.models import predict as predict_in_zoo
from ..models import FAMILIES, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart
from ..versions import compiles_all_families
from .flux import FLUX, RULES, expected, grafted

EDITS = [
    ("self_attention", "self_attention"),
    ("self_attention", "sliding_window"),
    ("self_attention", "neighborhood"),
    ("self_attention", "hyena_x"),
    ("self_attention", "linear_attention"),
    ("feed_forward", "mlp"),
    ("cross_attention", "self_attention"),
    ("cross_attention", "linear_attention"),
    ("self_attention", {"operator": "hyena_x", "init": "random"}),
    ("feed_forward", {"operator": "mlp", "expansion": 3}),
]


SAME_FUNCTION = ("self_attention", "mlp")


CASES = [
    (family, kind, spec)
    for family in FAMILIES
    for kind, spec in EDITS
    if family == "pixart" or kind != "cross_attention"
]


@pytest.mark.parametrize(("family", "kind", "spec"), CASES, ids=str)
def test_every_operator_goes_in_and_out_without_a_trace(family, kind, spec):
    model = FAMILIES[family]()
    before, tensors, modules = predict(model), tensors_of(model), dict(model.named_modules())
    model.set_graft({f"{kind}[::2]": spec})
    grafted = predict(model)
    assert grafted.isfinite().all()
    assert torch.equal(grafted, before) == (spec in SAME_FUNCTION)
    assert [name for name in tensors if name not in model.state_dict()] == [
        name
        for name in tensors
        if kind == "feed_forward" and name.startswith(tuple(f"{e.site.path}." for e in model.graft.plan.edits))
    ]
    model.disable_graft()
    assert torch.equal(predict(model), before)
    model.enable_graft()
    assert torch.equal(predict(model), grafted)
    graft = model.unset_graft()
    assert model.graft is None
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)
    assert dict(model.named_modules()) == modules
    assert not model._forward_pre_hooks
    model.set_graft(graft)
    assert torch.equal(predict(model), grafted)


@pytest.mark.parametrize(
    "rules",
    [
        {"self_attention[9:]": "hyena_x"},
        {"self_attention[0]": "hyena_q"},
        {"feed_forward[0]": "hyena_x"},
        {"self_attention[0]": "hyena_x", "self_attention[:2]": "sliding_window"},
        {"feed_forward[0]": {"operator": "mlp", "activation": "geglu"}},
        "/no/such/folder",
        "user/name/more",
        7,
        None,
    ],
)
def test_a_refused_graft_leaves_the_model_untouched(rules):
    model = tiny_dit()
    before, tensors = predict(model), tensors_of(model)
    with pytest.raises(GraftError):
        model.set_graft(rules)
    assert model.graft is None
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)


def test_hooks_of_others_stay():
    model, calls = tiny_dit(), []
    model.register_forward_pre_hook(lambda *given: calls.append(given))
    model.set_graft({"self_attention[0]": "hyena_x"})
    model.unset_graft()
    predict(model)
    assert len(calls) == 1


def test_grafting_twice_is_refused_and_names_the_sites():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    grafted = predict(model)
    with pytest.raises(StateError, match=r"same sites \(self_attention\[0\]\)"):
        model.set_graft({"self_attention[:2]": "sliding_window"})
    with pytest.raises(StateError, match="Put all rules into one plan"):
        model.set_graft({"self_attention[3]": "sliding_window"})
    assert torch.equal(predict(model), grafted)


def test_verbs_without_a_graft_say_so():
    for verb in ("unset_graft", "disable_graft", "enable_graft"):
        with pytest.raises(StateError, match="no graft"):
            getattr(tiny_dit(), verb)()


def test_a_graft_of_another_model_object_is_refused():
    one, other = tiny_dit(), tiny_dit()
    graft = dg.build_graft(one, dg.plan_graft(one, {"self_attention[0]": "hyena_x"}))
    with pytest.raises(StateError, match="another model object"):
        other.set_graft(graft)


def test_a_graft_that_cannot_go_in_again_leaves_the_model_without_one():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "hyena_x"})
    model.graft.body["proj_out_2.weight"] = model.proj_out_2.weight.detach().clone()  # as stage two leaves it
    graft, last = model.unset_graft(), model.proj_out_2
    model.proj_out_2 = torch.nn.Identity()
    with pytest.raises(StateError, match="trained proj_out_2.weight, which the model no longer has"):
        model.set_graft(graft)
    assert model.graft is None
    model.proj_out_2 = last
    model.set_graft(graft)


def test_deepcopy_and_pickle():
    model = tiny_dit()
    before = predict(model)
    model.set_graft({"self_attention[1::2]": "neighborhood", "feed_forward[0]": {"operator": "mlp", "expansion": 3}})
    grafted = predict(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(predict(twin), grafted)
        twin.unset_graft()
        assert torch.equal(predict(twin), before)
    assert torch.equal(predict(model), grafted)


def test_a_copy_takes_no_graph_of_the_last_inputs_along():
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "neighborhood"})
    sample = 2 * torch.ones(1, 1, 8, 8, requires_grad=True)
    with torch.no_grad():
        model(sample, timestep=torch.tensor([1]), class_labels=torch.tensor([1]))
    assert torch.equal(predict(copy.deepcopy(model)), predict(model))


def test_compiles_as_one_graph():
    model = tiny_dit()
    model.set_graft(
        {"self_attention[1::2]": "neighborhood", "self_attention[::2]": "hyena_x", "feed_forward[0]": "mlp"}
    )
    expected = predict(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    from diffusers_graft.inspection import example_inputs

    with torch.no_grad():
        output = compiled(**example_inputs(model, batch_size=2, seed=1)).sample
    torch.testing.assert_close(output, expected)


def test_threads_with_images_of_other_shapes_do_not_mix_them_up():
    model, seen = tiny_pixart(), []
    model.set_graft({"self_attention[:]": "neighborhood"})
    wide, tall = (
        {**example_inputs(model), "hidden_states": torch.ones(1, 4, *sides).cumsum(3)} for sides in ((8, 16), (16, 8))
    )

    @torch.no_grad()
    def answer(inputs):
        return model(**inputs).sample

    def meanwhile(*_):
        handle.remove()
        thread = threading.Thread(target=lambda: seen.append(answer(tall)))
        thread.start()
        thread.join()

    expected = answer(wide), answer(tall)
    handle = model.transformer_blocks[0].register_forward_hook(meanwhile)
    assert torch.equal(answer(wide), expected[0])
    assert torch.equal(seen[0], expected[1])


def test_other_resolutions_and_shapes():
    """The grid is that of the running forward."""
    model = tiny_pixart()
    model.set_graft({"self_attention[:]": "neighborhood"})
    for size in (8, 12, 20):
        assert predict(model, size=size).isfinite().all()
    with pytest.raises(GeometryError, match="the grid is 2 x 2"):
        predict(model, size=4)


def test_copies_and_pickles():
    model = grafted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(predict_in_zoo(twin, FLUX), expected())


COMPILED = {
    FLUX: RULES,
    "SD3Transformer2DModel": {"joint_attention[:]": "neighborhood"},
    "WanTransformer3DModel": {"self_attention[:]": "neighborhood"},
    "QwenImageTransformer2DModel": {"joint_attention[:]": "linear_attention"},
    "LTXVideoTransformer3DModel": {"self_attention[:]": "hyena_x"},
    "HunyuanVideoTransformer3DModel": {"joint_attention[:]": "neighborhood"},
    "ZImageTransformer2DModel": {"self_attention[2:]": "neighborhood"},
    "SanaTransformer2DModel": {"self_attention[:]": "neighborhood"},
    "SanaVideoTransformer3DModel": {"self_attention[:]": "linear_attention"},
    "AllegroTransformer3DModel": {"self_attention[:]": "sliding_window"},
}


@pytest.mark.parametrize("name", sorted(set(COMPILED) & set(exported())))
@compiles_all_families
def test_families_compile_as_one_graph(name):
    model = tiny(name)
    model.set_graft(COMPILED[name])
    eager = predict_in_zoo(model, name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(first(compiled(**inputs_of(name))), eager)


@compiles_all_families
def test_ten_blocks_compile_as_one():
    from torch._dynamo.testing import CompileCounter

    model = grafted({"joint_attention[:]": "neighborhood"}, num_layers=10, num_single_layers=0)
    eager = predict_in_zoo(model, FLUX)
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(predict_in_zoo(model, FLUX), eager)
    assert counter.frame_count == 1


def test_a_model_compiled_in_place_takes_a_graft():
    model = tiny(FLUX)
    model.compile(backend="eager")
    predict_in_zoo(model, FLUX)
    model.set_graft(RULES)
    torch.testing.assert_close(predict_in_zoo(model, FLUX), expected())


def test_a_compiled_wrapper_is_told_apart():
    with pytest.raises(ModelError, match="graft the model itself"):
        dg.find_sites(torch.compile(tiny(FLUX), backend="eager"))


SWAPS = {
    "another class": lambda model: model.transformer_blocks[1].attn1.set_processor(AttnProcessor()),
    "defaults": lambda model: model.set_default_attn_processor(),
    "fused": lambda model: model.fuse_qkv_projections(),
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_processors_that_another_verb_replaced_are_put_back(swap, tmp_path):
    model = tiny_pixart()
    model.set_graft({"self_attention[:]": "linear_attention"})
    grafted = predict(model)
    swap(model)
    with pytest.raises(StateError, match=r"Call model.enable_graft\(\) to put the graft's back"):
        predict(model)
    model.enable_graft()
    torch.testing.assert_close(predict(model), grafted)  # the attention that is not grafted was changed, too
    model.save_graft(tmp_path)
    swap(model)
    model.set_graft(model.unset_graft())
    torch.testing.assert_close(predict(model), grafted)
