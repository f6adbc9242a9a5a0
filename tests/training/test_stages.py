"""Stage one and stage two."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.errors import StateError, TrainingError, UnknownNameError
from diffusers_graft.evaluation.benchmark import PeakMemory
from diffusers_graft.inspection import predict as answer
from diffusers_graft.training.finetune.objective import denoising_loss
from diffusers_graft.training.noised_batch import Noising, drop_class_labels

from ..inspection.models import inputs_of, tiny
from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart

RANDOM = {"operator": "self_attention", "init": "random"}


def quick(steps=4, **settings):
    return dg.DistillConfig(steps=steps, progress=False, **{"lr": 1e-3, **settings})


def settle(steps=3, **settings):
    return dg.FinetuneConfig(steps=steps, progress=False, **{"lr": 1e-3, **settings})


def grafted(rules, seed=0):
    model = tiny_dit()
    return model, dg.build_graft(model, dg.plan_graft(model, rules), seed=seed)


def test_stage_one_teaches_every_site_and_touches_nothing_else():
    model, graft = grafted({"self_attention[1::2]": RANDOM, "feed_forward[0]": {"operator": "mlp", "init": "random"}})
    before, tensors, state = predict(model), tensors_of(model), torch.get_rng_state()
    reports = dg.distill(model, graft, batches(), quick(150, lr=5e-3), noise_scheduler=SCHEDULER)
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


def test_a_perfect_start_has_nothing_to_learn():
    model, graft = grafted(
        {"self_attention[:]": "self_attention", "feed_forward[:]": {"operator": "mlp", "expansion": 6}}
    )
    reports = dg.distill(model, graft, batches(), quick(1), noise_scheduler=SCHEDULER)
    assert all(report.losses[0] < 1e-6 for report in reports.values())


def test_the_losses_are_the_papers_unless_asked():
    """L1 for attention, L2 for feed-forwards: by hand, on the first step."""
    model, graft = grafted({"self_attention[0]": RANDOM, "feed_forward[0]": {"operator": "mlp", "init": "random"}})
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
    reports = dg.distill(model, graft, batches(), quick(1), noise_scheduler=SCHEDULER)
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


def test_one_teacher_forward_a_step_whatever_the_number_of_sites():
    model, graft = grafted({"self_attention[:]": RANDOM, "feed_forward[:]": "mlp"})
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    dg.distill(model, graft, batches(), quick(5), noise_scheduler=SCHEDULER)
    handle.remove()
    assert len(calls) == 5


def test_stage_one_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []
    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: (opened.append(a), real(*a, **k))[1])
    model, graft = grafted({"self_attention[:]": RANDOM})
    dg.distill(model, graft, batches(), quick(2), noise_scheduler=SCHEDULER)
    assert list(tmp_path.iterdir()) == []
    assert not [a for a in opened if len(a) > 1 and set(str(a[1])) & set("wax+")]


def peak_of_stage_one(sites):
    """Bytes over the model and the new parts with their optimiser state, at their largest."""
    model = tiny_dit(num_layers=8, num_attention_heads=4, attention_head_dim=16)
    graft = dg.build_graft(model, dg.plan_graft(model, {f"self_attention[:{sites}]": RANDOM}))
    for path in graft.seats:
        graft.untie(path)
    data = batches(count=1, size=32)
    with PeakMemory() as memory:
        dg.distill(model, graft, data, quick(2), noise_scheduler=SCHEDULER)
    own = sum(t.numel() * t.element_size() for path in graft.seats for t in graft.tensors_of(path).values())
    return memory.peak - 3 * own  # a gradient, and the two tensors that AdamW keeps for each weight


def test_memory_of_stage_one_does_not_grow_with_sites():
    two, eight = peak_of_stage_one(2), peak_of_stage_one(8)
    assert eight < 1.05 * two


def test_stage_one_needs_the_intact_model():
    model, graft = grafted({"self_attention[0]": RANDOM})
    model.set_graft(graft)
    with pytest.raises(StateError, match="watches the original parts"):
        dg.distill(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)
    model.disable_graft()
    dg.distill(model, graft, batches(), quick(1), noise_scheduler=SCHEDULER)


def poisoned():
    good, bad = batches(2)
    bad["sample"][0] = float("nan")
    return [good, bad]


def test_nan_in_stage_one_names_the_site_and_step_and_cleans_up():
    model, graft = grafted({"self_attention[2]": RANDOM})
    tensors = tensors_of(model)
    with pytest.raises(TrainingError, match=r"loss of self_attention\[2\] is nan at step 1"):
        dg.distill(model, graft, poisoned(), quick(), noise_scheduler=SCHEDULER)
    assert same_tensors(model, tensors)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(t.isfinite().all() for t in graft.tensors(model).values())


def interrupted():
    yield from batches(2)
    raise KeyboardInterrupt


def test_ctrl_c_in_stage_one_leaves_the_model_clean():
    model, graft = grafted({"self_attention[2]": RANDOM})
    before = predict(model)
    with pytest.raises(KeyboardInterrupt):
        dg.distill(model, graft, interrupted(), quick(9), noise_scheduler=SCHEDULER)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize(("data", "words"), [(lambda: iter(batches(2)), "ran out"), (list, "ran out")])
def test_batches_that_run_out(data, words):
    model, graft = grafted({"self_attention[2]": RANDOM})
    with pytest.raises(TrainingError, match=words):
        dg.distill(model, graft, data(), quick(9), noise_scheduler=SCHEDULER)


def test_clean_samples_need_a_scheduler_and_prepared_arguments_do_not():
    from diffusers_graft.inspection import example_inputs

    model, graft = grafted({"self_attention[2]": RANDOM})
    with pytest.raises(TrainingError, match="pass noise_scheduler="):
        dg.distill(model, graft, batches(), quick(1))
    dg.distill(model, graft, [example_inputs(model, batch_size=4)], quick(2))


def test_bad_settings():
    with pytest.raises(UnknownNameError, match="Did you mean 'huber'"):
        dg.DistillConfig(loss="hubert")
    with pytest.raises(TrainingError, match="at least one step"):
        dg.DistillConfig(steps=0)
    with pytest.raises(UnknownNameError, match="set of weights"):
        dg.FinetuneConfig(train="everything")
    with pytest.raises(UnknownNameError, match="timesteps"):
        Noising(timesteps="sometimes")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patience": 0}, "Counts"),
        ({"patience": 1.5}, "Counts"),
        ({"reuse": 1.5}, "Counts"),
        ({"memory": -5}, "Counts"),
        ({"ring": "a"}, "Counts"),
        ({"seed": 1.5}, "a seed are whole numbers"),
        ({"lr": float("inf")}, "positive learning rate"),
        ({"lr_scale": "x"}, "Factors"),
        ({"lr_scale": {"self_attention[1]": "x"}}, "Factors"),
        ({"closed_form": True}, "ClosedFormConfig"),
    ],
)
def test_settings_that_mean_nothing(settings, words):
    with pytest.raises(TrainingError, match=words):
        dg.DistillConfig(**settings)


def test_a_site_that_is_never_called_is_named():
    model = tiny_dit()
    model.spare = copy.deepcopy(model.transformer_blocks[0])
    graft = dg.build_graft(model, dg.plan_graft(model, {"feed_forward[:]": "mlp"}))
    with pytest.raises(TrainingError, match=r"does not call feed_forward\[4\]"):
        dg.distill(model, graft, batches(1), quick(2), noise_scheduler=SCHEDULER)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "operators"},
        {"train": "all"},
        {"train": "all", "ema_decay": 0.9},
        {"train": "operators", "lora": LoraConfig(r=2, target_modules=["to_q", "proj"])},
    ],
    ids=["operators", "all", "ema", "lora"],
)
def test_stage_two_learns_and_comes_out_without_a_trace(settings):
    model, graft = grafted({"self_attention[1::2]": RANDOM})
    before, tensors = predict(model), tensors_of(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.set_graft(graft)
    start = predict(model)
    losses = dg.finetune(model, batches(), settle(8, **settings), noise_scheduler=SCHEDULER)
    settled = predict(model)
    assert len(losses) == 8
    assert not torch.equal(settled, start)
    assert not model.training
    model.disable_graft()
    assert torch.equal(predict(model), before)
    model.enable_graft()
    assert torch.equal(predict(model), settled)
    graft = model.unset_graft()
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    model.set_graft(graft)
    assert torch.equal(predict(model), settled)


def test_lora_leaves_operators_trainable():
    """peft freezes whatever it did not add."""
    model, graft = grafted({"self_attention[1::2]": RANDOM})
    model.set_graft(graft)
    before = {name: t.clone() for name, t in graft.tensors(model).items()}
    lora = LoraConfig(r=2, target_modules=["to_q"])
    dg.finetune(model, batches(), settle(train="operators", lora=lora), noise_scheduler=SCHEDULER)
    after = graft.tensors(model)
    assert all(
        not torch.equal(after[name], tensor) for name, tensor in before.items() if not name.endswith("to_k.bias")
    )
    assert all(path.endswith("to_q") for path in graft.adapters)
    assert len(graft.adapters) == 2  # of the two attentions that were not grafted
    with pytest.raises(StateError, match="LoRA layers already"):
        dg.finetune(model, batches(), settle(lora=lora), noise_scheduler=SCHEDULER)


def test_settings_of_lora_alone_mean_lora():
    assert dg.FinetuneConfig(lora=LoraConfig(r=2)).train == "operators+lora"
    assert dg.FinetuneConfig().train == "all"


def test_a_body_that_lost_a_trained_weight_is_left_as_it_is():
    model, graft = grafted({"self_attention[1]": RANDOM})
    model.set_graft(graft)
    dg.finetune(model, batches(1), settle(1), noise_scheduler=SCHEDULER)
    model.proj_out_2, kept = torch.nn.Identity(), model.proj_out_2
    modules = dict(model.named_modules())
    with pytest.raises(StateError, match="proj_out_2.bias, which the model no longer has"):
        model.unset_graft()
    assert dict(model.named_modules()) == modules
    model.proj_out_2 = kept
    model.unset_graft()


@pytest.mark.parametrize("precision", ["fp16", "no"])
def test_weights_in_float16_are_not_trained(precision):
    model = tiny_dit().half()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[1]": RANDOM}))
    with pytest.raises(TrainingError, match="first, with precision"):
        dg.distill(model, graft, batches(1), quick(1, precision=precision), noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match="first, with precision"):
        dg.finetune(model, batches(1), settle(1, precision=precision), noise_scheduler=SCHEDULER)


class StopsAtTheEnd:
    def on_train_end(self, args, state, control, **_):
        raise KeyboardInterrupt


def test_the_average_is_taken_before_a_callback_can_fail():
    outputs = []
    for callbacks in ([], [StopsAtTheEnd()]):
        model, graft = grafted({"self_attention[1]": RANDOM})
        model.set_graft(graft)
        try:
            dg.finetune(
                model, batches(1), settle(2, lr=1e-2, ema_decay=0.9), noise_scheduler=SCHEDULER, callbacks=callbacks
            )
        except KeyboardInterrupt:
            pass
        outputs.append(predict(model))
    assert torch.equal(*outputs)


def test_settings_are_those_of_the_library_unless_given():
    model, graft = grafted({"self_attention[0]": RANDOM})
    for verb in (dg.distill, dg.closed_form):
        with pytest.raises(TrainingError, match="ran out"):
            verb(model, graft, [], noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match="ran out"):
        dg.finetune(model, [], noise_scheduler=SCHEDULER)


def test_stage_two_lowers_the_loss():
    model, graft = grafted({"self_attention[:]": RANDOM})
    model.set_graft(graft)
    data = batches(1, size=16)
    before = dg.evaluate(model, data, noise_scheduler=SCHEDULER)["denoising_loss"]
    dg.finetune(model, data, settle(60, lr=3e-3), noise_scheduler=SCHEDULER)
    assert dg.evaluate(model, data, noise_scheduler=SCHEDULER)["denoising_loss"] < before


def test_nan_and_ctrl_c_in_stage_two_leave_a_sound_model():
    model, graft = grafted({"self_attention[1]": RANDOM})
    before = predict(model)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match="loss is nan at step 1"):
        dg.finetune(model, poisoned(), settle(), noise_scheduler=SCHEDULER)
    assert predict(model).isfinite().all()
    with pytest.raises(KeyboardInterrupt):
        dg.finetune(model, interrupted(), settle(9), noise_scheduler=SCHEDULER)
    assert predict(model).isfinite().all()
    assert not model.training
    model.unset_graft()
    assert torch.equal(predict(model), before)


def test_stage_one_needs_the_model_that_the_graft_was_built_beside():
    model, graft = grafted({"self_attention[1]": RANDOM})
    for other in (tiny_dit(), tiny_pixart()):
        with pytest.raises(StateError, match="built beside another model object"):
            dg.distill(other, graft, batches(), quick(1), noise_scheduler=SCHEDULER)


class Takes:
    """A callback that calls a verb of the model after a step."""

    def __init__(self, verb, *arguments, step=1):
        self.verb, self.arguments, self.step = verb, arguments, step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.verb(*self.arguments)


def test_stage_one_ends_where_a_callback_grafts_the_model():
    model, graft = grafted({"self_attention[1]": RANDOM})
    with pytest.raises(StateError, match="grafted the model after step 1"):
        dg.distill(
            model, graft, batches(), quick(2), noise_scheduler=SCHEDULER, callbacks=[Takes(model.set_graft, graft)]
        )
    assert model.graft is graft


@pytest.mark.parametrize("verb", ["unset_graft", "disable_graft"])
@pytest.mark.parametrize("step", [1, 2])
def test_the_original_is_not_trained_where_a_callback_takes_the_graft_out(verb, step):
    model, graft = grafted({"self_attention[1]": RANDOM})
    before, tensors = predict(model), tensors_of(model)
    model.set_graft(graft)
    with pytest.raises(StateError, match=f"took the graft out after step {step}"):
        dg.finetune(
            model,
            batches(),
            settle(2, ema_decay=0.9),
            noise_scheduler=SCHEDULER,
            callbacks=[Takes(getattr(model, verb), step=step)],
        )
    assert torch.equal(predict(model), before)
    assert same_tensors(model, tensors)
    assert not model.training


def test_stage_two_needs_a_running_graft_and_a_target():
    model, graft = grafted({"self_attention[1]": RANDOM})
    with pytest.raises(StateError, match="no graft"):
        dg.finetune(model, batches(), settle(), noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    model.disable_graft()
    with pytest.raises(StateError, match="enable_graft"):
        dg.finetune(model, batches(), settle(), noise_scheduler=SCHEDULER)
    model.enable_graft()
    from diffusers_graft.inspection import example_inputs

    with pytest.raises(TrainingError, match="what to predict"):
        dg.finetune(model, [example_inputs(model)], settle())


def test_training_is_reproducible():
    results = []
    for _ in range(2):
        model, graft = grafted({"self_attention[1]": RANDOM})
        dg.distill(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)
        model.set_graft(graft)
        dg.finetune(model, batches(), settle(), noise_scheduler=SCHEDULER)
        results.append(predict(model))
        torch.rand(3)
    assert torch.equal(*results)


def test_pixart_both_stages():
    from diffusers_graft.inspection import example_inputs

    model = tiny_pixart()
    conditions = example_inputs(model, batch_size=4)
    batch = {"sample": conditions.pop("hidden_states"), **{k: v for k, v in conditions.items() if k != "timestep"}}
    graft = dg.build_graft(
        model, dg.plan_graft(model, {"self_attention[1::2]": "neighborhood", "cross_attention[0]": RANDOM})
    )
    reports = dg.distill(model, graft, [batch], quick(80), noise_scheduler=SCHEDULER)
    assert all(sum(report.losses[-10:]) < sum(report.losses[:10]) for report in reports.values())
    model.set_graft(graft)
    assert len(dg.finetune(model, [batch], settle(), noise_scheduler=SCHEDULER)) == 3


def test_both_stages_of_a_model_that_answers_in_lists():
    model, inputs = tiny("ZImageTransformer2DModel"), inputs_of("ZImageTransformer2DModel")
    batch = {"sample": torch.stack(inputs["x"]), "cap_feats": inputs["cap_feats"]}
    graft, flow = (
        dg.build_graft(model, dg.plan_graft(model, {"self_attention[:]": "hyena_x"})),
        FlowMatchEulerDiscreteScheduler(),
    )
    reports = dg.distill(model, graft, [batch], quick(20), noise_scheduler=flow)
    assert all(sum(report.losses[-5:]) < sum(report.losses[:5]) for report in reports.values())
    model.set_graft(graft)
    assert len(dg.finetune(model, [batch], settle(), noise_scheduler=flow)) == 3
    one = {**batch, "sample": batch["sample"][:1], "cap_feats": batch["cap_feats"][:1]}
    alone = dg.evaluate(model, [one], noise_scheduler=flow)
    assert alone.values["denoising_loss"] != dg.evaluate(model, [batch], noise_scheduler=flow).values["denoising_loss"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HiDreamImageTransformer2DModel", "joint_attention"),  # which answers otherwise in training
        ("Cosmos3OmniTransformer", "joint_attention"),  # whose streams are packed
        ("T5FilmDecoder", "self_attention"),
        ("MiniMaxMusic3RVQDepthDecoder", "self_attention"),  # whose forwards have no return_dict
    ],
)
def test_both_stages_of_models_with_ways_of_their_own(name, kind):
    model, inputs = tiny(name), inputs_of(name)
    graft = dg.build_graft(model, dg.plan_graft(model, {f"{kind}[0]": "self_attention"}))
    with torch.no_grad():
        batch = {**inputs, "target": torch.zeros_like(answer(model, inputs))}
    (report,) = dg.distill(model, graft, [batch], quick(1)).values()
    model.set_graft(graft)
    losses = dg.finetune(model, [batch], settle(1, distill_output=1.0))
    assert torch.tensor([*report.losses, *losses]).isfinite().all()


def test_a_target_of_another_shape_is_refused():
    (model, graft), batch = grafted({"self_attention[:]": "hyena_x"}), batches(1)[0]
    model.set_graft(graft)
    odd = {
        **{name: value for name, value in batch.items() if name != "sample"},
        "hidden_states": batch["sample"],
        "timestep": torch.zeros(len(batch["sample"]), dtype=torch.long),
        "target": batch["sample"][:, :, :1],
    }
    with pytest.raises(TrainingError, match="The model predicts"):
        dg.finetune(model, [odd], settle())


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_noise_and_targets_of_ddpm(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    sample = torch.randn(6, 1, 8, 8)
    noised = Noising(scheduler=scheduler)(tiny_dit(), {"sample": sample}, torch.Generator().manual_seed(0))
    t, x = noised.timestep, noised.inputs["hidden_states"]
    a = scheduler.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    s = (1 - scheduler.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    noise = (x - a * sample) / s
    expected = {"epsilon": noise, "sample": sample, "v_prediction": a * noise - s * sample}[kind]
    torch.testing.assert_close(noised.target, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_and_targets_of_flow_matching(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sample = torch.randn(512, 1, 2, 2)
    noised = Noising(scheduler=scheduler, timesteps="uniform")(
        tiny_dit(), {"sample": sample}, torch.Generator().manual_seed(0)
    )
    sigma = noised.inputs["timestep"].view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(noised.inputs["hidden_states"], sample + sigma * noised.target, rtol=1e-4, atol=1e-4)
    median = shift * 0.5 / (1 + (shift - 1) * 0.5)
    assert sigma.median().item() == pytest.approx(median, abs=0.06)


def test_labels_are_dropped_for_the_whole_sample_at_the_models_rate():
    labels = drop_class_labels(tiny_dit(), torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == {0, 5}
    assert (labels == 5).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_learned_variance_is_left_out_of_the_loss():
    prediction, target = torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4)
    assert denoising_loss(prediction, target) == torch.nn.functional.mse_loss(prediction[:, :4], target)


def test_evaluation_is_a_fixed_draw():
    model = tiny_dit()
    first, second = (dg.evaluate(model, batches(), noise_scheduler=SCHEDULER) for _ in range(2))
    assert first == second
    assert first.protocol["samples"] == 32
    with pytest.raises(TrainingError, match="no batches"):
        dg.evaluate(model, [], noise_scheduler=SCHEDULER)


class Singles(torch.utils.data.Dataset):
    """Single samples, as datasets hold them."""

    items = batches(20, size=1)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {name: value[0] for name, value in self.items[index].items()}


def test_the_trainer_saves_after_each_stage_and_survives_ctrl_c(tmp_path):
    data = Singles()
    arguments = dg.GraftTrainingArguments(
        output_dir=tmp_path / "out", distill=quick(), finetune=settle(train="operators"), per_device_train_batch_size=4
    )
    trainer = dg.GraftTrainer(
        tiny_dit(),
        {"self_attention[1::2]": "neighborhood"},
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        noise_scheduler=SCHEDULER,
    )
    trainer.distill()
    after_one = predict(trainer.model)
    trainer.train_dataset = interrupted()
    with pytest.raises(KeyboardInterrupt):
        trainer.finetune()
    fresh = tiny_dit()
    fresh.load_graft(tmp_path / "out")
    assert torch.equal(predict(fresh), after_one)
    trainer.train_dataset = data
    trainer.finetune()
    assert trainer.evaluate()["denoising_loss"] > 0
    trainer.save_model()
    assert "denoising loss" in (tmp_path / "out" / "README.md").read_text()
    fresh = tiny_dit()
    fresh.set_graft(str(tmp_path / "out"))
    assert torch.equal(predict(fresh), predict(trainer.model))


def test_the_trainer_trains(tmp_path):
    arguments = dg.GraftTrainingArguments(output_dir=tmp_path, distill=quick(2), finetune=settle(2))
    trainer = dg.GraftTrainer(
        tiny_dit(), "self_attention[50%]=hyena_x", args=arguments, train_dataset=batches(), noise_scheduler=SCHEDULER
    )
    trainer.train()
    assert [row["stage"] for row in trainer.graft.history] == ["one", "two"]
    with pytest.raises(StateError, match="eval_dataset"):
        trainer.evaluate()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_both_stages_learn_whatever_is_around_them(around):
    model, plain = tiny_dit(), tiny_dit()
    for one, context in ((model, around), (plain, torch.enable_grad)):
        with context():
            graft = dg.build_graft(one, dg.plan_graft(one, {"self_attention[1]": "hyena_x", "feed_forward[0]": "mlp"}))
            dg.closed_form(one, graft, batches(), dg.ClosedFormConfig(steps=1), noise_scheduler=SCHEDULER)
            dg.distill(one, graft, batches(), quick(2), noise_scheduler=SCHEDULER)
        one.set_graft(graft)
        with context():
            dg.finetune(one, batches(), settle(2), noise_scheduler=SCHEDULER)
    assert same_tensors(model, tensors_of(plain))
