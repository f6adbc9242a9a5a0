"""The recipe of a card makes the graft again."""

import re

import peft
import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.cards.recipe import recipe
from diffusers_graft.serialization.model_card import card

from ..models import SCHEDULER, batches, predict, tiny_dit

RULES = {
    "self_attention[0,1,3]": "hyena_x(kernel_size=3)",
    "self_attention[2]": {"operator": "linear_attention", "init": "random"},
    "feed_forward[::2]": dg.operators.get("mlp").Config(expansion=1.5),
}


def code_of(text):
    return re.search(r"```python\n(.*?)```", text.split("## Recipe")[1], re.DOTALL)[1]


@pytest.mark.parametrize(
    "rules",
    [RULES, {"block[1]": "remove", "block_pair[1]": "parallel"}, {"block_run[0:2]": "linear_block"}],
    ids=["parts", "blocks", "a run of blocks"],
)
def test_the_rules_of_a_card_are_the_plan(rules):
    model = tiny_dit()
    plan = dg.plan_graft(model, rules)
    model.set_graft(plan)
    scope = {"dg": dg, "model": tiny_dit()}
    exec(code_of(card(model)), scope)
    assert scope["graft"].plan.to_dict() == plan.to_dict()


def test_the_stages_of_a_card_train_the_graft_again():
    model = tiny_dit(2)
    graft = dg.build_graft(model, dg.plan_graft(model, {"feed_forward[1]": "mlp(expansion=2)"}))
    closed_form = dg.ClosedFormConfig(steps=2, progress=False)
    one = dg.DistillConfig(steps=3, lr=2e-3, warmup=1, closed_form=closed_form, progress=False)
    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    two = dg.FinetuneConfig(steps=2, lora=lora, warmup=0, seed=5, progress=False)
    dg.distill(model, graft, list(batches()), one, noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    dg.finetune(model, list(batches()), two, noise_scheduler=SCHEDULER)
    code = code_of(card(model))
    assert "lr=0.002" in code
    assert "seed=5" in code
    assert "progress" not in code
    again = tiny_dit(2)
    scope = {"dg": dg, "peft": peft, "model": again, "batches": list(batches()), "noise_scheduler": SCHEDULER}
    exec(code, scope)
    assert torch.equal(predict(again), predict(model))


def test_rows_of_earlier_versions_keep_the_objective_they_were_trained_with():
    model = tiny_dit(2)
    model.set_graft({"feed_forward[1]": "mlp(expansion=2)"})
    model.graft.history.append(
        {"stage": "two", "steps": 2, "lr": 1e-3, "distill_output": 0.0, "distill_features": 0.0}
    )
    assert "denoising=1.0" in code_of(card(model))


def test_a_full_model_has_no_recipe(tmp_path):
    model = tiny_dit(2)
    model.set_graft({"feed_forward[0]": "linear_mlp"})
    model.save_pretrained(tmp_path)
    loaded = dg.load_pretrained(tmp_path)
    assert recipe(loaded.graft, is_full_model=True) is None
    assert "## Recipe" not in (tmp_path / "README.md").read_text()


def test_a_history_that_a_person_edited_is_passed_over():
    model = tiny_dit(2)
    model.set_graft({"feed_forward[0]": "linear_mlp"})
    model.graft.history += ["by hand", {"stage": "three"}, {"steps": 5}]
    assert "dg.distill" not in recipe(model.graft, is_full_model=False)
