"""Stage one: what it trains, and what it refuses."""

import copy

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import StateError, TrainingError

from ...inspection.models import inputs_of, tiny
from ...models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart
from ..runs import HYENA, RANDOM, CallsVerb, build, distill_config, interrupted, poisoned, run_distill


def test_every_site_is_trained_and_nothing_else_changes():
    model, graft = build({"self_attention[1::2]": RANDOM, "feed_forward[0]": {"operator": "mlp", "init": "random"}})
    before, tensors, state = predict(model), tensors_of(model), torch.get_rng_state()
    reports = dg.distill(model, graft, batches(), distill_config(150, lr=5e-3), noise_scheduler=SCHEDULER)
    assert set(reports) == {"self_attention[1]", "self_attention[3]", "feed_forward[0]"}
    for report in reports.values():
        assert len(report.losses) == 150
        assert sum(report.losses[-10:]) < 0.5 * sum(report.losses[:10])
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    model.set_graft(graft)
    assert (predict(model) - before).norm() < 0.5 * before.norm()


def test_a_perfect_start_has_no_loss():
    model, graft = build(
        {"self_attention[:]": "self_attention", "feed_forward[:]": {"operator": "mlp", "expansion": 6}}
    )
    reports = dg.distill(model, graft, batches(), distill_config(1), noise_scheduler=SCHEDULER)
    assert all(report.losses[0] < 1e-6 for report in reports.values())


def test_the_default_losses_are_the_papers():
    """L1 for attention, L2 for feed-forwards: by hand, on the first step."""
    model, graft = build({"self_attention[0]": RANDOM, "feed_forward[0]": {"operator": "mlp", "init": "random"}})
    seen = {}
    originals = {e.site.address: model.get_submodule(e.site.path) for e in graft.plan.edits}
    handles = [
        module.register_forward_hook(
            lambda m, a, k, out, address=address: seen.update({address: (a, k, out)}), with_kwargs=True
        )
        for address, module in originals.items()
    ]
    seats = {edit.site.address: graft.seats[edit.site.path] for edit in graft.plan.edits}
    before = {name: {n: p.clone() for n, p in seat.state_dict().items()} for name, seat in seats.items()}
    reports = dg.distill(model, graft, batches(), distill_config(1), noise_scheduler=SCHEDULER)
    for handle in handles:
        handle.remove()
    for address, loss in (
        ("self_attention[0]", torch.nn.functional.l1_loss),
        ("feed_forward[0]", torch.nn.functional.mse_loss),
    ):
        seats[address].load_state_dict(before[address])
        args, kwargs, output = seen[address]
        assert reports[address].losses[0] == pytest.approx(
            loss(seats[address](*args, **kwargs), output).item(), rel=1e-5
        )


def test_nothing_is_written_without_an_output_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []
    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: (opened.append(a), real(*a, **k))[1])
    model, graft = build({"self_attention[:]": RANDOM})
    dg.distill(model, graft, batches(), distill_config(2), noise_scheduler=SCHEDULER)
    assert list(tmp_path.iterdir()) == []
    assert not [a for a in opened if len(a) > 1 and set(str(a[1])) & set("wax+")]


def test_the_original_model_is_needed():
    model, graft = build({"self_attention[0]": RANDOM})
    model.set_graft(graft)
    with pytest.raises(StateError, match="watches the original parts"):
        dg.distill(model, graft, batches(), distill_config(), noise_scheduler=SCHEDULER)
    model.disable_graft()
    dg.distill(model, graft, batches(), distill_config(1), noise_scheduler=SCHEDULER)


def test_a_loss_that_is_nan_names_site_and_step():
    model, graft = build({"self_attention[2]": RANDOM})
    tensors = tensors_of(model)
    with pytest.raises(TrainingError, match=r"loss of self_attention\[2\] is nan at step 1"):
        dg.distill(model, graft, poisoned(), distill_config(), noise_scheduler=SCHEDULER)
    assert same_tensors(model, tensors)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(t.isfinite().all() for t in graft.tensors(model).values())


def test_ctrl_c_leaves_the_model_as_it_was():
    model, graft = build({"self_attention[2]": RANDOM})
    before = predict(model)
    with pytest.raises(KeyboardInterrupt):
        dg.distill(model, graft, interrupted(), distill_config(9), noise_scheduler=SCHEDULER)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize(("data", "words"), [(lambda: iter(batches(2)), "ran out"), (list, "ran out")])
def test_batches_that_run_out_are_an_error(data, words):
    model, graft = build({"self_attention[2]": RANDOM})
    with pytest.raises(TrainingError, match=words):
        dg.distill(model, graft, data(), distill_config(9), noise_scheduler=SCHEDULER)


def test_clean_samples_need_a_scheduler_and_prepared_arguments_do_not():
    from diffusers_graft.inspection import example_inputs

    model, graft = build({"self_attention[2]": RANDOM})
    with pytest.raises(TrainingError, match="pass noise_scheduler="):
        dg.distill(model, graft, batches(), distill_config(1))
    dg.distill(model, graft, [example_inputs(model, batch_size=4)], distill_config(2))


def test_a_site_that_is_never_called_is_named():
    model = tiny_dit()
    model.spare = copy.deepcopy(model.transformer_blocks[0])
    graft = dg.build_graft(model, dg.plan_graft(model, {"feed_forward[:]": "mlp"}))
    with pytest.raises(TrainingError, match=r"does not call feed_forward\[4\]"):
        dg.distill(model, graft, batches(1), distill_config(2), noise_scheduler=SCHEDULER)


def test_the_model_that_the_graft_was_built_beside_is_needed():
    model, graft = build({"self_attention[1]": RANDOM})
    for other in (tiny_dit(), tiny_pixart()):
        with pytest.raises(StateError, match="built beside another model object"):
            dg.distill(other, graft, batches(), distill_config(1), noise_scheduler=SCHEDULER)


def test_a_callback_that_grafts_the_model_ends_the_stage():
    model, graft = build({"self_attention[1]": RANDOM})
    with pytest.raises(StateError, match="grafted the model after step 1"):
        dg.distill(
            model,
            graft,
            batches(),
            distill_config(2),
            noise_scheduler=SCHEDULER,
            callbacks=[CallsVerb(model.set_graft, graft)],
        )
    assert model.graft is graft


def test_losses_and_learning_rates_by_site():
    rules = {"self_attention[:2]": HYENA}
    _, graft, reports = run_distill(
        rules, steps=1, loss={"self_attention[0]": "l2"}, lr_scale={"self_attention[1]": 0.0}
    )
    _, _, usual = run_distill(rules, steps=1)
    one, two = (reports[f"self_attention[{i}]"] for i in range(2))
    assert one.losses != usual["self_attention[0]"].losses
    assert two.losses == usual["self_attention[1]"].losses
    fresh = dg.build_graft(tiny_dit(), graft.plan)
    paths = [edit.site.path for edit in graft.plan.edits]
    same = [torch.equal(graft.seats[path].to_v.weight, fresh.seats[path].to_v.weight) for path in paths]
    assert same == [False, True]


def test_closed_form_comes_before_the_first_step():
    rules = {"self_attention[1::2]": "hyena_x"}
    _, _, plain = run_distill(rules, steps=1)
    _, graft, solved = run_distill(rules, steps=1, closed_form=dg.ClosedFormConfig(steps=8, progress=False))
    assert all(solved[address].errors[0] < plain[address].errors[0] for address in plain)
    assert [row["stage"] for row in graft.history] == ["closed form", "one"]
    parts = {"self_attention[0]": "hyena_x", "feed_forward[0]": "moe_mlp"}  # experts end in no layer of the whole
    _, graft, reports = run_distill(parts, steps=1, closed_form=dg.ClosedFormConfig(steps=2, progress=False))
    assert len(reports) == 2
    assert [row["site"] for row in graft.history[0]["sites"]] == ["self_attention[0]"]
    _, graft, _ = run_distill(
        {"feed_forward[0]": "moe_mlp"}, steps=1, closed_form=dg.ClosedFormConfig(steps=2, progress=False)
    )
    assert [row["stage"] for row in graft.history] == ["one"]


def test_settings_by_site_name_sites_of_the_graft():
    with pytest.raises(
        TrainingError, match=r"'feed_forward\[0\]' names none of the graft's sites: it has self_attention\[0\]"
    ):
        run_distill({"self_attention[0]": HYENA}, loss={"feed_forward[0]": "l1"})
    model = tiny_dit()
    graft = dg.build_graft(model, dg.GraftPlan(type(model).__name__, ()))
    assert str(graft) == ""
    with pytest.raises(TrainingError, match="replaces nothing"):
        dg.distill(model, graft, batches(), dg.DistillConfig(steps=1, progress=False), noise_scheduler=SCHEDULER)


def test_pairs_and_parts_inside_them_are_trained_together(tmp_path):
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


def test_blocks_with_two_streams_are_trained():
    model = tiny("SD3Transformer2DModel")
    graft = dg.build_graft(model, dg.plan_graft(model, "block_pair[0]=parallel"))
    inputs = inputs_of("SD3Transformer2DModel")
    (report,) = dg.distill(model, graft, [inputs] * 20, dg.DistillConfig(steps=20, lr=1e-3, progress=False)).values()
    assert report.errors[-1] < report.errors[0]


def test_parts_without_weights_are_passed_over_and_refused_alone():
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
