"""Both stages of blocks side by side, and the table of half the depth."""

import shutil
from pathlib import Path

import pytest
import torch

import diffusers_graft as dg
from benchmarks.depth import RUNS, Budget, bench_depth, steps_of
from diffusers_graft.errors import GraftError, TrainingError

from ..inspection.models import inputs_of, tiny
from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit

STORED = Path(__file__).parents[2] / "examples" / "benchmarks" / "depth"


def test_stage_one_brings_pairs_and_what_lies_inside_them_closer(tmp_path):
    model = tiny_dit()
    before = tensors_of(model)
    graft = dg.build_graft(model, dg.plan_graft(model, "self_attention[0]=hyena_x; block_pair[:]=parallel"))
    config = dg.DistillConfig(steps=40, lr=1e-3, progress=False)
    reports = dg.distill(model, graft, batches(40), config, noise_scheduler=SCHEDULER)
    assert same_tensors(model, before)
    assert set(reports) == {"self_attention[0]", "block_pair[0]", "block_pair[1]"}
    assert all(report.errors[-1] < 0.7 * report.errors[0] for report in reports.values())
    model.set_graft(graft)
    dg.finetune(model, batches(2), dg.FinetuneConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    output = predict(model)
    model.save_graft(tmp_path)
    model.unset_graft()
    assert same_tensors(model, before)
    model.load_graft(tmp_path)
    assert torch.equal(predict(model), output)


def test_a_pair_learns_what_the_second_block_gave_for_the_firsts_input():
    model = tiny_dit(num_layers=2)
    graft = dg.build_graft(model, dg.plan_graft(model, "block_pair[0]=parallel"))
    calls = {}
    first, second = model.transformer_blocks
    hooks = [
        first.register_forward_pre_hook(lambda module, args: calls.update(given=args[0])),
        second.register_forward_hook(lambda module, args, output: calls.update(wanted=output)),
    ]
    from diffusers_graft.inspection import example_inputs
    from diffusers_graft.training.distill.capture import Capture

    watch, seen = Capture(model, graft), {}
    with watch.hooks():
        watch.run(example_inputs(model), graft.operators(), lambda path, call: seen.update({path: call}))
    for hook in hooks:
        hook.remove()
    (call,) = seen.values()
    assert call.args[0] is calls["given"]
    assert call.output is calls["wanted"]


def test_stage_one_of_blocks_with_two_streams():
    model = tiny("SD3Transformer2DModel")
    graft = dg.build_graft(model, dg.plan_graft(model, "block_pair[0]=parallel"))
    inputs = inputs_of("SD3Transformer2DModel")
    (report,) = dg.distill(model, graft, [inputs] * 20, dg.DistillConfig(steps=20, lr=1e-3, progress=False)).values()
    assert report.errors[-1] < report.errors[0]


def test_removed_blocks_have_nothing_to_learn_and_what_stays_of_them_is_put_back():
    model = tiny_dit()
    before = tensors_of(model)
    model.set_graft("block[0]=remove")
    dg.finetune(model, batches(2), dg.FinetuneConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    model.unset_graft()
    assert same_tensors(model, before)


def test_what_has_no_weights_is_passed_over_and_alone_refused():
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, "block[1]=remove; self_attention[3]=hyena_x"))
    config = dg.DistillConfig(steps=1, progress=False)
    assert set(dg.distill(model, graft, batches(1), config, noise_scheduler=SCHEDULER)) == {"self_attention[3]"}
    with pytest.raises(TrainingError, match="nothing to learn in stage one"):
        dg.distill(
            model,
            dg.build_graft(model, dg.plan_graft(model, "block[1]=remove")),
            batches(1),
            config,
            noise_scheduler=SCHEDULER,
        )
    model.set_graft("block[1]=remove")
    with pytest.raises(TrainingError, match="None of the new parts has weights"):
        dg.finetune(
            model, batches(1), dg.FinetuneConfig(steps=1, train="operators", progress=False), noise_scheduler=SCHEDULER
        )


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = tiny_dit()
        model.set_graft("block_pair[:]=parallel")
        model.train() if checkpointed else None
        if checkpointed:
            model.enable_gradient_checkpointing()
            for module in model.modules():
                module.training = module is model
        from diffusers_graft.inspection import example_inputs

        model(**example_inputs(model)).sample.square().mean().backward()
        gradients.append(model.transformer_blocks[1].attn1.to_q.weight.grad)
    assert torch.allclose(*gradients)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "MochiTransformer3DModel"])
def test_a_last_block_that_ends_the_prompts_stream_can_be_one_linear_map(name):
    model, answers = tiny(name), []
    for rules in ("block[-1]=remove", "block[-1]=linear_block"):
        model.set_graft(rules)
        answers.append(model(**inputs_of(name)).sample)
        graft = model.unset_graft()
    assert torch.equal(*answers)
    (report,) = dg.distill(
        model, graft, [inputs_of(name)] * 20, dg.DistillConfig(steps=20, lr=1e-2, progress=False)
    ).values()
    assert report.errors[-1] < 0.9 * report.errors[0]


def test_all_that_pairs_got_is_given_to_others_in_steps_of_their_own_price():
    prices = {"pairs: stage one": 0.5, "pairs: stage two": 0.25, "removed: stage two": 0.1}
    budget = Budget(stage_one=100, stage_two=200)
    assert steps_of("both at once", "pairs", budget, prices) == 400
    assert steps_of("both at once", "removed", budget, prices) == 1000
    assert steps_of("stage two", "removed", budget, prices) == 200


def test_the_stored_report_is_what_its_rows_say(tmp_path):
    shutil.copy(STORED / "depth.jsonl", tmp_path)
    assert bench_depth(tmp_path, say=[].append) == (STORED / "depth.md").read_text(encoding="utf-8")
    assert (tmp_path / "depth.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_table_of_half_the_depth_goes_on_where_it_stopped(tmp_path):
    budget = Budget(stage_one=1, stage_two=1, batch_size=2, samples=30, sampling_steps=1, rounds=2, seeds=1)
    report = bench_depth(tmp_path, budget, say=[].append)
    assert all(name in report for run in RUNS for name in run.rows.values())
    rows = (tmp_path / "depth.jsonl").read_text().splitlines()
    (tmp_path / "depth.jsonl").write_text("\n".join(rows[:4]) + "\n")  # killed between the two stages of the pairs
    assert bench_depth(tmp_path, budget, say=[].append) == report
    with pytest.raises(GraftError, match="another budget"):
        bench_depth(tmp_path, Budget(seeds=1), say=[].append)
