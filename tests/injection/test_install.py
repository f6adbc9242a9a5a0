"""In and out again, bit for bit."""

import copy
import pickle
import threading

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import diffusers_graft as dg
from diffusers_graft.errors import GeometryError, GraftError, OperatorError, StateError
from diffusers_graft.injection.attention_processor import _intercept_call, grafted_class, is_grafted
from diffusers_graft.inspection import example_inputs
from tests.tiny_models import inputs_of, tiny

from ..models import FAMILIES, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart

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


def test_a_shared_self_graft_shares_and_adds_nothing():
    model = tiny_dit()
    names = list(model.state_dict())
    model.set_graft({"self_attention[:]": "self_attention"})
    assert list(model.state_dict()) == names
    assert model.graft.tensors(model) == {}


def test_other_attention_is_untouched_by_masks():
    """PixArt pads its prompts: the mask reaches a cross-attention graft."""
    from diffusers_graft.inspection import example_inputs

    model = tiny_pixart()
    inputs = example_inputs(model, batch_size=2)
    inputs["encoder_attention_mask"][:, 5:] = 0
    before = model(**inputs).sample
    model.set_graft({"cross_attention[:]": "self_attention"})
    assert torch.equal(model(**inputs).sample, before)
    model.unset_graft()
    model.set_graft({"cross_attention[:]": "linear_attention"})
    masked = model(**inputs).sample
    inputs["encoder_hidden_states"][:, 5:] += 7
    assert torch.equal(model(**inputs).sample, masked)


def test_a_mask_that_hides_is_refused_by_operators_that_cannot_honour_it():
    from diffusers_graft.inspection import example_inputs

    model = tiny_pixart()
    model.set_graft({"self_attention[:]": "hyena_x"})
    mask = torch.ones(1, 16)
    model(**example_inputs(model), attention_mask=mask)
    with pytest.raises(GeometryError, match="cannot honour an attention mask"):
        model(**example_inputs(model), attention_mask=mask.tril(12))


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


def test_building_leaves_torchs_generator_alone_and_follows_its_seed():
    model = tiny_dit()
    plan = dg.plan_graft(model, {"self_attention[:]": {"operator": "hyena_x", "init": "random"}})
    state = torch.get_rng_state()
    grafts = [dg.build_graft(model, plan, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (graft.tensors(model) for graft in grafts)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_projections_that_start_at_random_are_drawn_alike_in_every_precision():
    rules = {"self_attention[0]": {"operator": "hyena_x", "init": "random"}}
    one, half = tiny_dit(), tiny_dit().to(torch.bfloat16)
    one.set_graft(rules)
    half.set_graft(rules)
    drawn, rounded = (model.graft.tensors(model) for model in (one, half))
    assert all(torch.equal(tensor.bfloat16(), rounded[name]) for name, tensor in drawn.items())


def test_lost_processors_are_noticed_at_the_next_forward_and_save(tmp_path):
    model = tiny_pixart()
    model.set_graft({"self_attention[1]": "hyena_x"})
    model.fuse_qkv_projections()
    with pytest.raises(StateError, match="was lost: its processor is now FusedAttnProcessor2_0"):
        predict(model)
    with pytest.raises(StateError, match="was lost"):
        model.save_graft(tmp_path)


class WithoutACore:
    """What it makes of its input is no mixing of queries, keys and values."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return attn.to_out[0](attn.to_v(hidden_states).cumsum(1))


def test_processors_without_a_core_are_refused():
    model = tiny_dit()
    model.transformer_blocks[0].attn1.set_processor(WithoutACore())
    with pytest.raises(OperatorError, match="never calls scaled_dot_product_attention"):
        model.set_graft({"self_attention[0]": "hyena_x"})


def test_processors_that_multiply_scores_themselves_are_rewritten_too():
    model = tiny_dit()
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    before = predict(model)
    model.set_graft({"self_attention[0]": "self_attention"})
    torch.testing.assert_close(predict(model), before)
    model.unset_graft()
    model.set_graft({"self_attention[0]": "neighborhood"})
    assert not torch.allclose(predict(model), before)


def test_without_source_the_softmax_is_caught_on_its_way(monkeypatch):
    model = tiny_pixart()
    before = predict(model)
    original = type(model.transformer_blocks[0].attn1.processor)
    cls = grafted_class(original)
    monkeypatch.setattr(cls, "__call__", _intercept_call(original))
    model.set_graft({"self_attention[:]": "self_attention", "cross_attention[:]": "self_attention"})
    assert torch.equal(predict(model), before)
    model.unset_graft()
    model.set_graft({"self_attention[:]": "neighborhood"})
    assert not torch.equal(predict(model), before)


def test_without_source_a_softmax_that_is_not_caught_is_no_graft(monkeypatch):
    model = tiny_dit()
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())  # multiplies scores itself
    monkeypatch.setattr(grafted_class(AttnProcessor), "__call__", _intercept_call(AttnProcessor))
    model.set_graft({"self_attention[0]": "neighborhood"})
    with pytest.raises(OperatorError, match="never called scaled_dot_product_attention"):
        predict(model)


def test_what_a_processor_was_told_stays():
    model = tiny_dit()
    model.transformer_blocks[0].attn1.processor.told = 7
    model.set_graft({"self_attention[0]": "hyena_x"})
    assert model.transformer_blocks[0].attn1.processor.told == 7


def test_one_generated_class_for_each_processor_class():
    model = tiny_dit()
    model.set_graft({"self_attention[:]": "hyena_x"})
    processors = [block.attn1.processor for block in model.transformer_blocks]
    assert len({type(processor) for processor in processors}) == 1
    assert all(map(is_grafted, processors))


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


def test_gradient_checkpointing():
    from diffusers_graft.inspection import example_inputs

    gradients = []
    for checkpointing in (False, True):
        model = tiny_dit()
        model.set_graft({"self_attention[:]": "neighborhood"})
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        inputs = example_inputs(model, batch_size=2)
        torch.manual_seed(0)
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("spec", ["neighborhood", {"operator": "hyena_x", "layout": "2d"}], ids=str)
def test_gradient_checkpointing_of_two_forwards_at_once(spec):
    """Blocks that run again are told what they were told the first time, not what the last forward was."""
    gradients = []
    for checkpointing in (False, True):
        model, inputs = tiny("SanaTransformer2DModel").train(), inputs_of("SanaTransformer2DModel")
        model.set_graft({"self_attention[:]": {"operator": spec} if isinstance(spec, str) else spec})
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(2)
        images = torch.randn(2, 4, 4, 12), torch.randn(2, 4, 8, 6)
        sum(model(**{**inputs, "hidden_states": image}).sample.square().sum() for image in images).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    model.unset_graft()
    functions = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    assert {function.__module__ for function in functions if function} == {"diffusers.models.modeling_utils"}


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
