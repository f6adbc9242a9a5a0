"""Steps of stage one."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.evaluation.benchmark import PeakMemory
from diffusers_graft.training.noised_batch import Noising

from ...models import SCHEDULER, batches, predict, tiny_dit
from ..runs import HYENA, RANDOM, build, calls_of, distill_config, run_distill


def test_a_step_costs_one_teacher_forward_for_any_number_of_sites():
    model, graft = build({"self_attention[:]": RANDOM, "feed_forward[:]": "mlp"})
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    dg.distill(model, graft, batches(), distill_config(5), noise_scheduler=SCHEDULER)
    handle.remove()
    assert len(calls) == 5


def peak_memory(sites):
    """Bytes over the model and the new parts with their optimiser state, at their largest."""
    model = tiny_dit(num_layers=8, num_attention_heads=4, attention_head_dim=16)
    graft = dg.build_graft(model, dg.plan_graft(model, {f"self_attention[:{sites}]": RANDOM}))
    for path in graft.seats:
        graft.untie(path)
    data = batches(count=1, size=32)
    with PeakMemory() as memory:
        dg.distill(model, graft, data, distill_config(2), noise_scheduler=SCHEDULER)
    own = sum(t.numel() * t.element_size() for path in graft.seats for t in graft.tensors_of(path).values())
    return memory.peak - 3 * own  # a gradient, and the two tensors that AdamW keeps for each weight


def test_memory_does_not_grow_with_sites():
    two, eight = peak_memory(2), peak_memory(8)
    assert eight < 1.05 * two


def test_a_finished_site_costs_nothing_more():
    """The sites that have stopped getting better are not run again, and the teacher stops before the last of them."""
    model = tiny_dit()
    counts, steps = calls_of(model), 12
    rules = {"self_attention[0]": HYENA, "self_attention[3]": HYENA}
    seat_calls = []
    graft = dg.build_graft(model, dg.plan_graft(model, rules))
    graft.seats["transformer_blocks.3.attn1"].register_forward_pre_hook(lambda *_: seat_calls.append(1))
    config = dg.DistillConfig(
        steps=steps, lr=1e-3, patience=1, evaluate_every=3, progress=False, lr_scale={"self_attention[3]": 1e-12}
    )
    reports = dg.distill(model, graft, batches(), config, noise_scheduler=SCHEDULER, held_out=batches(1, seed=9))
    last = reports["self_attention[3]"]
    assert last.finished is not None
    assert last.finished < steps
    assert len(last.losses) == last.finished
    looks = len(last.held_out)
    assert len(seat_calls) == last.finished + looks
    assert counts[3] == last.finished + looks
    assert counts[0] >= steps
    assert reports["self_attention[0]"].finished is None


def test_the_teacher_stops_behind_the_last_site_that_trains():
    model = tiny_dit()
    counts = calls_of(model)
    model, graft, reports = run_distill({"self_attention[:]": HYENA}, model, steps=5, sites=("self_attention[:2]",))
    assert list(reports) == ["self_attention[0]", "self_attention[1]"]
    assert counts == [5, 5, 1, 1]  # the first forward is whole: it shows the order
    fresh = dg.build_graft(model, graft.plan)
    same = [torch.equal(graft.seats[p].to_v.weight, fresh.seats[p].to_v.weight) for p in graft.seats]
    assert same == [False, False, True, True]
    with pytest.raises(TrainingError, match="None of the graft's sites"):
        run_distill({"self_attention[0]": HYENA}, sites="self_attention[1]")


def test_sequential_mode_shows_the_output_of_the_new_parts_before():
    """The second site's first input: the block before it, as it is when the first part's answer stands in it."""
    heard = {}
    for mode in ("parallel", "sequential"):
        model = tiny_dit()
        graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[:2]": HYENA}))
        seat = graft.seats["transformer_blocks.1.attn1"]
        handle = seat.register_forward_pre_hook(lambda m, args, mode=mode: heard.setdefault(mode, args[0]))
        dg.distill(
            model,
            graft,
            batches(),
            dg.DistillConfig(steps=1, lr=1e-12, mode=mode, progress=False),
            noise_scheduler=SCHEDULER,
        )
        handle.remove()
    assert not torch.equal(heard["parallel"], heard["sequential"])
    model.set_graft(graft)
    generator = torch.Generator().manual_seed(0)

    noised = Noising(scheduler=SCHEDULER)(model, batches()[0], generator)
    seen = []
    model.transformer_blocks[1].attn1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**noised.inputs)
    torch.testing.assert_close(seen[0], heard["sequential"])


def test_correcting_mode_compares_with_the_original_models_own_output():
    """The second site is shown what the first new part makes of it, and compared with the intact model's site."""
    model, graft, reports = run_distill({"self_attention[:2]": HYENA}, steps=1, lr=1e-12, mode="correcting", loss="l2")
    inputs = Noising(scheduler=SCHEDULER)(model, batches()[0], torch.Generator().manual_seed(0)).inputs
    outputs = []
    for is_grafted in (False, True):
        if is_grafted:
            model.set_graft(graft)
        attention = model.transformer_blocks[1].attn1
        handle = attention.register_forward_hook(lambda m, args, output: outputs.append(output))
        with torch.no_grad():
            model(**inputs)
        handle.remove()
    expected = torch.nn.functional.mse_loss(*outputs).item()
    assert reports["self_attention[1]"].losses[0] == pytest.approx(expected, rel=1e-4)


def test_sequential_mode_passes_over_a_part_that_is_never_called():
    model = tiny_dit()
    model.transformer_blocks[3].forward = lambda hidden_states, **_: hidden_states
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[:]": "hyena_x"}))
    config = dg.DistillConfig(steps=3, mode="sequential", sites="self_attention[:3]", progress=False)
    assert len(dg.distill(model, graft, batches(2), config, noise_scheduler=SCHEDULER)) == 3


def test_sequential_mode_leaves_no_larger_error_of_the_model():
    gaps = {}
    for mode in ("parallel", "sequential"):
        model, before = tiny_dit(), predict(tiny_dit())
        model, graft, _ = run_distill(
            {"self_attention[:]": HYENA, "feed_forward[:]": {"operator": "mlp", "expansion": 1}},
            model,
            steps=150,
            lr=3e-3,
            mode=mode,
        )
        model.set_graft(graft)
        gaps[mode] = (predict(model) - before).norm().item()
    assert gaps["sequential"] < 1.1 * gaps["parallel"]


@pytest.mark.parametrize("reuse", [2, 4])
def test_reuse_saves_forwards_of_the_teacher(reuse):
    model = tiny_dit()
    counts = calls_of(model)
    _, _, reports = run_distill({"self_attention[:]": HYENA}, model, steps=16, reuse=reuse, ring=4)
    assert all(len(report.losses) == 16 for report in reports.values())
    assert counts[0] == 16 // reuse + 1  # one more to see how much a batch takes


def test_groups_fit_the_memory_given_and_end_the_teachers_forward_early():
    model = tiny_dit()
    counts = calls_of(model)
    one_call = 2 * 8 * 16 * 16 * 4  # input and output of 8 samples of 16 tokens of width 16, in float32
    limit = 4 * 2 * one_call  # two sites, four batches
    with PeakMemory() as memory:
        _, _, reports = run_distill({"self_attention[:]": HYENA}, model, steps=16, reuse=4, ring=4, memory=limit)
    assert all(len(report.losses) == 16 for report in reports.values())
    assert counts == [1 + 4 + 4, 1 + 4 + 4, 1 + 4, 1 + 4]
    with PeakMemory() as roomy:
        run_distill({"self_attention[:]": HYENA}, tiny_dit(), steps=16, reuse=4, ring=4)
    assert roomy.peak - memory.peak > 0.9 * limit
    with pytest.raises(TrainingError, match="reuse may keep 1,000"):
        run_distill({"self_attention[:]": HYENA}, steps=4, reuse=4, memory=1000)


def test_reuse_on_the_host_has_the_context_of_each_call():
    _, _, reports = run_distill({"self_attention[:]": "neighborhood"}, steps=4, reuse=2, ring=2, host=True)
    assert all(len(report.losses) == 4 for report in reports.values())


@pytest.mark.parametrize("mixed", ["bf16", "fp16"])
def test_mixed_precision_leaves_weights_in_float32_and_stays_close(mixed):
    runs = {
        precision: run_distill({"self_attention[1]": HYENA}, steps=20, precision=precision)
        for precision in ("no", mixed)
    }
    (exact,), (rounded,) = (run[2].values() for run in runs.values())
    assert rounded.losses[-1] == pytest.approx(exact.losses[-1], rel=0.1)
    assert rounded.losses != exact.losses
    graft = runs[mixed][1]
    assert {tensor.dtype for path in graft.seats for tensor in graft.tensors_of(path).values()} == {torch.float32}


def test_accumulated_batches_are_one_larger_batch():
    """With the noise fixed, since that is drawn batch by batch."""
    from diffusers_graft.inspection import example_inputs

    model = tiny_dit()
    whole = example_inputs(model, batch_size=8)
    halves = [{name: value[i : i + 4] for name, value in whole.items()} for i in (0, 4)]
    _, one, _ = run_distill({"self_attention[1]": HYENA}, model, [whole], loss="l2")
    _, two, _ = run_distill({"self_attention[1]": HYENA}, model, halves, loss="l2", accumulate=2)
    for name, tensor in one.tensors(model).items():
        torch.testing.assert_close(tensor, two.tensors(model)[name], rtol=1e-4, atol=1e-5)
