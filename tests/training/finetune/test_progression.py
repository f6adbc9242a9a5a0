"""Progressive replacement: sites take turns, and the result is an ordinary graft."""

import itertools

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import StateError, TrainingError, UnknownNameError
from diffusers_graft.training.finetune.progression import has_settled
from diffusers_graft.training.noised_batch import Noising

from ...models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit
from ..runs import RANDOM, StopAt, StopError, build, grafted_model, run_finetune, same

RULES = {
    "self_attention[1]": RANDOM,
    "feed_forward[2]": {"operator": "mlp", "expansion": 1, "init": "random"},
    "self_attention[3]": "self_attention",
}
PLAIN = {"optimizer": "SGD", "lr": 0.1, "schedule": "constant", "max_grad_norm": 1e9}


def with_one_part_of(model, key):
    """A model grafted at one of the sites alone, with that part's weights."""
    alone = grafted_model(rules={key: RULES[key]})
    for path, seat in alone.graft.seats.items():
        seat.load_state_dict(model.graft.seats[path].state_dict())
    return alone


def test_the_first_part_trains_among_originals_as_if_it_were_alone():
    model = grafted_model(rules=RULES)
    alone = with_one_part_of(model, "self_attention[1]")
    before = tensors_of(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    settings = {**PLAIN, "train": "operators", "steps": 6, "progressive_share": 1.0}
    for grafted, progressive in ((model, "forward"), (alone, None)):
        with pytest.raises(StopError):
            run_finetune(grafted, batches(2), callbacks=[StopAt(2)], progressive=progressive, **settings)
    expected = alone.state_dict()
    name = "transformer_blocks.1.attn1.to_q.weight"
    assert not torch.equal(expected[name], before[name])
    for name, tensor in model.state_dict().items():
        is_first = name.startswith("transformer_blocks.1.attn1.")
        assert torch.equal(tensor, expected[name] if is_first else before[name]), name
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize("settings", [{}, {"distill_output": 1.0, "gradient_checkpointing": True}], ids=str)
def test_in_the_end_all_parts_have_been_trained_and_the_original_comes_back(settings):
    model, graft = build(RULES)
    before = tensors_of(model)
    output = predict(model)
    model.set_graft(graft)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_finetune(model, steps=6, progressive="forward", **settings)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])]
    for path in graft.seats:
        assert any(name.startswith(path) for name in moved)
    originals = [parameter for original in graft.originals.values() for parameter in original.parameters()]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in originals)
    model.unset_graft()
    assert torch.equal(predict(model), output)
    assert same_tensors(model, before)


def test_the_part_that_does_the_least_harm_alone_comes_first():
    model = grafted_model(rules=RULES)
    inputs = Noising(scheduler=SCHEDULER)(model, batches(1)[0], torch.Generator().manual_seed(0)).inputs
    harms = {}
    for key in RULES:
        with torch.no_grad():
            error = with_one_part_of(model, key)(**inputs).sample - tiny_dit()(**inputs).sample
        harms[key] = error.square().mean().item()
    run_finetune(model, batches(1), steps=1, progressive="least_harm")
    assert model.graft.history[-1]["order"] == sorted(harms, key=harms.get)


def test_a_progressive_run_resumes_bit_equal(tmp_path):
    def run(folder, **arguments):
        model = grafted_model(rules=RULES)
        settings = {"steps": 6, "lr": 0.02, "warmup": 0, "save_every": 2, "progressive": "least_harm"}
        settings |= {"progressive_patience": 1, "progressive_share": 1.0}
        run_finetune(model, output_dir=folder, **settings, **arguments)
        return model.state_dict(), [model.graft.history[-1][name] for name in ("order", "turns")]

    expected, order = run(tmp_path / "through")
    with pytest.raises(StopError):
        run(tmp_path / "cut", callbacks=[StopAt(3)])
    tensors, again = run(tmp_path / "cut", resume=True)
    assert same(tensors, expected)
    assert again == order


def test_losses_have_settled_when_as_many_steps_again_are_no_better():
    assert has_settled([2.0, 1.0, 1.0, 2.0], 2)
    assert has_settled([9.0, 3.0, 1.0, 2.0, 2.5], 2)
    assert not has_settled([2.0, 1.0, 1.0, 1.9], 2)
    assert not has_settled([1.0, 1.0, 1.0], 2)


def test_the_next_part_is_put_in_once_the_last_one_has_settled_or_its_share_is_up():
    turns = {}
    # With hardly any rate, the loss moves with the draws of noise alone.
    settings = {**PLAIN, "train": "operators", "steps": 12, "progressive": "forward", "progressive_share": 1.0}
    for patience, lr in ((None, 1e-9), (1, 1e-9), (3, 1e-9), (1, 1e-3)):
        model = grafted_model(rules=RULES)
        losses = run_finetune(model, batches(1), progressive_patience=patience, **{**settings, "lr": lr})
        turns[patience, lr] = model.graft.history[-1]["turns"]
        if patience is not None:
            since = [0, *turns[patience, lr][1:]]
            for first, turn in itertools.pairwise(since):
                is_due = turn in turns[None, 1e-9]
                assert is_due or has_settled(losses[first:turn], patience)
                assert not any(has_settled(losses[first:step], patience) for step in range(first, turn))
    sites = len(RULES)
    assert turns[None, 1e-9] == [12 * number // sites for number in range(sites)]
    assert turns[1, 1e-9] != turns[None, 1e-9]
    assert all(early <= late for early, late in zip(turns[3, 1e-9], turns[None, 1e-9], strict=True))


def test_turns_that_cannot_be_taken_are_refused():
    with pytest.raises(UnknownNameError, match="least_harm"):
        dg.FinetuneConfig(progressive="backward")
    refused = (
        {"progressive_share": 0.0},
        {"progressive": "forward", "compile": True},
        {"progressive_patience": 0},
        {"progressive_patience": 2.5},
    )
    for settings in refused:
        with pytest.raises(TrainingError, match="share of the steps|compile=False|steps from 1"):
            dg.FinetuneConfig(**settings)


def test_a_model_without_its_original_has_no_teacher_and_takes_no_turns(tmp_path):
    grafted_model().save_pretrained(tmp_path)
    model = dg.load_pretrained(tmp_path)
    for settings in ({"distill_output": 1.0}, {"progressive": "forward"}):
        with pytest.raises(StateError, match="no original"):
            run_finetune(model, **settings)
