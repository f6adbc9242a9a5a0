"""Several grafts on one model, by name."""

import copy

import pytest
import torch
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.errors import StateError, UnknownNameError

from ..models import SCHEDULER, batches, predict, tiny_dit

MIX, WIDE = (
    {"self_attention[1::2]": {"operator": "hyena_x", "init": "random"}},
    {"feed_forward[0]": {"operator": "mlp", "expansion": 6, "init": "random"}},
)
HOOD = {"self_attention[0]": "neighborhood"}


def outputs(*rules):
    """Of the same parts in one plan each, so that random starts agree."""
    model = tiny_dit()
    for number, rule in enumerate(rules):
        model.set_graft(rule, graft_name=f"g{number}")
    return predict(model)


@pytest.fixture
def two():
    model = tiny_dit()
    plain = predict(model)
    model.set_graft(MIX, graft_name="mix")
    mixed = predict(model)
    model.set_graft(WIDE, graft_name="wide")
    return model, plain, mixed


def test_both_run_and_each_alone(two):
    model, plain, mixed = two
    both = predict(model)
    assert model.active_grafts() == ["mix", "wide"]
    assert len(model.graft.plan.edits) == 3
    model.set_active_graft("mix")
    assert torch.equal(predict(model), mixed)
    model.set_active_graft("wide")
    wide = predict(model)
    assert not any(torch.equal(wide, other) for other in (plain, mixed, both))
    model.set_active_graft([])
    assert torch.equal(predict(model), plain)
    assert model.graft is None
    model.set_active_graft(["wide", "mix"])
    assert torch.equal(predict(model), both)
    model.disable_graft()
    assert torch.equal(predict(model), plain)
    model.enable_graft()
    assert torch.equal(predict(model), both)


def test_as_one_plan_of_the_same_parts(two):
    model, _, _ = two
    state = model.state_dict()
    other = tiny_dit()
    other.set_graft({**MIX, **WIDE})
    other.load_state_dict(state)
    assert torch.equal(predict(other), predict(model))


def test_out_again_bit_for_bit(two):
    model, plain, mixed = two
    fresh = tiny_dit()
    assert model.unset_graft("wide") is not None
    assert torch.equal(predict(model), mixed)
    model.unset_graft("mix")
    assert torch.equal(predict(model), plain)
    assert list(model.state_dict()) == list(fresh.state_dict())
    with pytest.raises(StateError, match="no graft"):
        model.unset_graft()


def test_disabled_ones_stay_so_while_others_come_and_go(two):
    model, plain, _ = two
    model.disable_graft()
    model.set_graft(HOOD, graft_name="hood")
    assert torch.equal(predict(model), plain)
    model.unset_graft("wide")
    assert torch.equal(predict(model), plain)
    model.enable_graft()
    assert model.active_grafts() == ["mix", "hood"]
    assert torch.equal(predict(model), outputs(MIX, HOOD))
    model.set_active_graft([])
    model.set_graft(WIDE, graft_name="wide")
    assert torch.equal(predict(model), outputs(WIDE))


def test_all_out_at_once_and_in_again(two):
    model, plain, _ = two
    both = predict(model)
    graft = model.unset_graft()
    assert torch.equal(predict(model), plain)
    assert model.active_grafts() == []
    model.set_graft(graft)
    assert torch.equal(predict(model), both)


def test_what_is_refused_leaves_all_as_it_was(two, tmp_path):
    model, _, _ = two
    both = predict(model)
    refusals = [
        (
            lambda: model.set_graft({"self_attention[1]": "neighborhood"}, graft_name="third"),
            StateError,
            "'mix' and 'third' both",
        ),
        (lambda: model.set_graft(HOOD, graft_name="mix"), StateError, "'mix' already"),
        (lambda: model.set_graft(HOOD), StateError, "grafted already"),
        (lambda: model.set_graft(HOOD, graft_name=""), StateError, "a text of one letter or more; got ''"),
        (lambda: model.load_graft(tmp_path, graft_name=3), StateError, "a text of one letter or more; got 3"),
        (
            lambda: model.set_graft({"self_attention[9]": "hyena_x"}, graft_name="third"),
            dg.GraftError,
            "matches nothing",
        ),
        (lambda: model.load_graft(tmp_path, graft_name="third"), dg.GraftError, "There is no"),
        (lambda: model.set_active_graft("mixx"), UnknownNameError, "Did you mean 'mix'"),
        (lambda: model.unset_graft("third"), UnknownNameError, "third"),
        (lambda: model.save_graft(tmp_path / "x"), StateError, "say graft_name="),
    ]
    for refused, kind, words in refusals:
        with pytest.raises(kind, match=words):
            refused()
        assert model.active_grafts() == ["mix", "wide"]
        assert torch.equal(predict(model), both)
    model.set_active_graft([])
    with pytest.raises(StateError, match="wait here"):
        model.set_graft(HOOD)


def test_each_is_saved_and_loaded_by_itself(two, tmp_path):
    model, plain, mixed = two
    both = predict(model)
    for name in ("mix", "wide"):
        model.save_graft(tmp_path / name, graft_name=name)
    assert torch.equal(predict(model), both)
    fresh = tiny_dit()
    fresh.load_graft(tmp_path / "wide", graft_name="w")
    fresh.set_graft(tmp_path / "mix", graft_name="m")
    assert torch.equal(predict(fresh), both)
    fresh.unset_graft("w")
    assert torch.equal(predict(fresh), mixed)
    with pytest.raises(dg.GraftError):
        fresh.load_graft(tmp_path / "nothing", graft_name="n")
    assert torch.equal(predict(fresh), mixed)


def test_what_training_gave_one_goes_with_it(tmp_path):
    model = tiny_dit()
    plain = predict(model)
    model.set_graft(HOOD, graft_name="trained")
    settings = {"train": "operators", "lora": LoraConfig(r=2, target_modules=["to_q"])}
    dg.finetune(
        model, batches(), dg.FinetuneConfig(steps=2, lr=1e-2, progress=False, **settings), noise_scheduler=SCHEDULER
    )
    trained = predict(model)
    model.set_graft(WIDE, graft_name="wide")
    both = predict(model)
    model.set_active_graft("wide")
    wide = predict(model)
    for names, expected in (
        (["trained"], trained),
        ([], plain),
        (["wide", "trained"], both),
        (["wide"], wide),
        (["trained", "wide"], both),
    ):
        model.set_active_graft(names)
        assert torch.equal(predict(model), expected)
    model.save_graft(tmp_path, graft_name="trained")
    fresh = tiny_dit()
    fresh.load_graft(tmp_path)
    assert torch.equal(predict(fresh), trained)


def test_weights_that_one_trained_cannot_be_replaced_by_another():
    model = tiny_dit()
    model.set_graft(HOOD, graft_name="trained")
    dg.finetune(
        model, batches(), dg.FinetuneConfig(steps=2, lr=1e-2, progress=False, train="all"), noise_scheduler=SCHEDULER
    )
    trained = predict(model)
    with pytest.raises(StateError, match="'trained' trained transformer_blocks.0.ff"):
        model.set_graft(WIDE, graft_name="wide")
    assert torch.equal(predict(model), trained)


def test_training_both_keeps_what_was_learned():
    model = tiny_dit()
    plain = predict(model)
    model.set_graft(HOOD, graft_name="a")
    model.set_graft(WIDE, graft_name="b")
    dg.finetune(
        model, batches(), dg.FinetuneConfig(steps=2, lr=1e-2, progress=False, train="all"), noise_scheduler=SCHEDULER
    )
    both = predict(model)
    model.set_active_graft([])
    assert torch.equal(predict(model), plain)
    model.set_active_graft(["a", "b"])
    assert torch.equal(predict(model), both)


def test_a_copy_of_the_model_has_them_too(two):
    model, plain, mixed = two
    twin = copy.deepcopy(model)
    twin.set_active_graft("mix")
    assert torch.equal(predict(twin), mixed)
    assert model.active_grafts() == ["mix", "wide"]
