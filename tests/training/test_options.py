"""What stage one can be told, each by what it does."""

import io

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_graft as dg
from diffusers_graft.errors import ModelError, TrainingError, UnknownNameError
from diffusers_graft.evaluation.benchmark import PeakMemory
from diffusers_graft.training.distill.losses import LOSSES, relative_l2
from diffusers_graft.training.metrics_log import read_metrics

from ..models import SCHEDULER, batches, predict, tiny_dit, tiny_pixart

RANDOM = {"operator": "self_attention", "init": "random"}
HYENA = {"operator": "hyena_x", "init": "random"}


def teach(
    rules, model=None, data=None, *, held_out=None, output_dir=None, seed=0, callbacks=(), null_prompt=None, **settings
):
    model = model or tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, rules), seed=seed)
    config = dg.DistillConfig(**{"steps": 3, "lr": 1e-3, "progress": False, **settings})
    reports = dg.distill(
        model,
        graft,
        data or batches(),
        config,
        noise_scheduler=SCHEDULER,
        held_out=held_out,
        output_dir=output_dir,
        callbacks=callbacks,
        null_prompt=null_prompt,
    )
    return model, graft, reports


def calls_of(model):
    """How often every block runs from now on."""
    counts = [0] * len(model.transformer_blocks)
    for number, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, number=number: counts.__setitem__(number, counts[number] + 1))
    return counts


def test_relative_l2_is_scale_free_and_splits_over_samples():
    wanted, answer = torch.randn(2, 4, 5, 3)
    assert relative_l2(7 * answer, 7 * wanted) == pytest.approx(relative_l2(answer, wanted).item(), rel=1e-5)
    halves = [relative_l2(a, w).item() for a, w in zip(answer.split(2), wanted.split(2), strict=True)]
    assert relative_l2(answer, wanted).item() == pytest.approx(sum(halves) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_teaches(loss):
    _, _, reports = teach({"self_attention[1]": HYENA}, steps=60, lr=5e-3, loss=loss)
    (report,) = reports.values()
    assert sum(report.losses[-10:]) < 0.8 * sum(report.losses[:10])


def test_losses_and_learning_rates_by_site():
    rules = {"self_attention[:2]": HYENA}
    _, graft, reports = teach(rules, steps=1, loss={"self_attention[0]": "l2"}, lr_scale={"self_attention[1]": 0.0})
    _, _, usual = teach(rules, steps=1)
    one, two = (reports[f"self_attention[{i}]"] for i in range(2))
    assert one.losses != usual["self_attention[0]"].losses
    assert two.losses == usual["self_attention[1]"].losses
    fresh = dg.build_graft(tiny_dit(), graft.plan)
    paths = [edit.site.path for edit in graft.plan.edits]
    same = [torch.equal(graft.seats[path].to_v.weight, fresh.seats[path].to_v.weight) for path in paths]
    assert same == [False, True]


@pytest.mark.parametrize("make", [tiny_dit, tiny_pixart])
def test_gated_lessons_compare_what_the_block_adds(make):
    """By hand: the difference of the block's stream before and after the part, on the first step."""
    model = make()
    from diffusers_graft.inspection import example_inputs

    inputs = example_inputs(model, batch_size=4)
    rules = {"self_attention[1]": RANDOM, "feed_forward[1]": {"operator": "mlp", "init": "random"}}
    graft = dg.build_graft(model, dg.plan_graft(model, rules))
    block, added = model.transformer_blocks[1], {}

    def stream(part):
        """What the block adds for one part: its output with the part, less that with the part's answer taken away."""
        outputs = []
        for keep in (1, 0):
            handle = part.register_forward_hook(lambda m, a, out, keep=keep: out * keep)
            capture = []
            other = block.register_forward_hook(lambda m, a, out, capture=capture: capture.append(out))
            with torch.no_grad():
                model(**inputs)
            handle.remove()
            other.remove()
            outputs.append(capture[0])
        return outputs[0] - outputs[1]

    added["feed_forward[1]"] = stream(block.ff)
    reports = dg.distill(
        model, graft, [inputs], dg.DistillConfig(steps=1, gated=True, progress=False, loss="l2", lr=1e-9)
    )
    with torch.no_grad():
        seat = graft.seats["transformer_blocks.1.ff"]
        model.transformer_blocks[1].ff, original = seat, block.ff
        grafted = stream(seat)
        model.transformer_blocks[1].ff = original
    expected = (grafted - added["feed_forward[1]"]).square().mean().item()
    assert reports["feed_forward[1]"].losses[0] == pytest.approx(expected, rel=1e-3)
    raw = dg.distill(
        model,
        dg.build_graft(model, graft.plan),
        [inputs],
        dg.DistillConfig(steps=1, progress=False, loss="l2", lr=1e-9),
    )
    assert raw["feed_forward[1]"].losses[0] != pytest.approx(expected, rel=0.2)


def test_relative_error_and_cosine_are_those_of_the_answers():
    """By hand, for the part as it starts: |new - old| / |old| and the angle, on the batch that it was shown."""
    from diffusers_graft.inspection import example_inputs

    model, seen = tiny_dit(), []
    inputs = example_inputs(model, batch_size=4)
    handle = model.transformer_blocks[1].attn1.register_forward_hook(
        lambda m, a, k, out: seen.append((a, k, out)), with_kwargs=True
    )
    _, graft, reports = teach({"self_attention[1]": RANDOM}, model, [inputs], steps=1, lr=1e-12)
    handle.remove()
    args, kwargs, wanted = seen[0]
    with torch.no_grad():
        answer = graft.seats["transformer_blocks.1.attn1"](*args, **kwargs)
    (report,) = reports.values()
    assert report.errors[0] == pytest.approx(((answer - wanted).norm() / wanted.norm()).item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(answer.flatten(), wanted.flatten(), dim=0).item()
    assert report.cosines[0] == pytest.approx(cosine, rel=1e-3)
    assert report.to_dict()["cosine"] == report.cosines[0]


def test_held_out_batches_choose_the_weights():
    model, graft, reports = teach(
        {"self_attention[1::2]": HYENA},
        steps=60,
        lr=0.05,
        schedule="constant",
        evaluate_every=1,
        held_out=batches(1, seed=9),
    )
    for report in reports.values():
        errors = [look.error for look in report.held_out]
        assert [look.step for look in report.held_out] == list(range(61))
        assert report.best_step == report.held_out[errors.index(min(errors))].step
        row = report.to_dict()
        assert row["held_out_error"] == min(errors)
        assert 0 < row["held_out_cosine"] < 1
    assert min(report.best_step for report in reports.values()) < 60
    again = dg.distill(
        model,
        graft,
        batches(),
        dg.DistillConfig(steps=1, lr=1e-12, evaluate_every=1, progress=False),
        noise_scheduler=SCHEDULER,
        held_out=batches(1, seed=9),
    )
    for address, report in again.items():
        assert report.held_out[0].error == pytest.approx(
            min(look.error for look in reports[address].held_out), rel=1e-4
        )


def test_what_training_makes_worse_keeps_its_start():
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, {"feed_forward[0]": "mlp"}))  # the original itself
    config = dg.DistillConfig(steps=3, lr=0.1, warmup=0, evaluate_every=1, progress=False)
    (report,) = dg.distill(
        model, graft, batches(), config, noise_scheduler=SCHEDULER, held_out=batches(1, seed=9)
    ).values()
    assert report.best_step == 0
    before = predict(model)
    model.set_graft(graft)
    torch.testing.assert_close(predict(model), before)


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


def test_some_sites_alone_and_the_teacher_stops_behind_them():
    model = tiny_dit()
    counts = calls_of(model)
    model, graft, reports = teach({"self_attention[:]": HYENA}, model, steps=5, sites=("self_attention[:2]",))
    assert list(reports) == ["self_attention[0]", "self_attention[1]"]
    assert counts == [5, 5, 1, 1]  # the first forward is whole: it shows the order
    fresh = dg.build_graft(model, graft.plan)
    same = [torch.equal(graft.seats[p].to_v.weight, fresh.seats[p].to_v.weight) for p in graft.seats]
    assert same == [False, False, True, True]
    with pytest.raises(TrainingError, match="None of the graft's sites"):
        teach({"self_attention[0]": HYENA}, sites="self_attention[1]")


def test_closed_form_comes_before_the_first_step():
    rules = {"self_attention[1::2]": "hyena_x"}
    _, _, plain = teach(rules, steps=1)
    _, graft, solved = teach(rules, steps=1, closed_form=dg.ClosedFormConfig(steps=8, progress=False))
    assert all(solved[address].errors[0] < plain[address].errors[0] for address in plain)
    assert [row["stage"] for row in graft.history] == ["closed form", "one"]
    parts = {"self_attention[0]": "hyena_x", "feed_forward[0]": "moe_mlp"}  # experts end in no layer of the whole
    _, graft, reports = teach(parts, steps=1, closed_form=dg.ClosedFormConfig(steps=2, progress=False))
    assert len(reports) == 2
    assert [row["site"] for row in graft.history[0]["sites"]] == ["self_attention[0]"]
    _, graft, _ = teach(
        {"feed_forward[0]": "moe_mlp"}, steps=1, closed_form=dg.ClosedFormConfig(steps=2, progress=False)
    )
    assert [row["stage"] for row in graft.history] == ["one"]


def test_sequential_lessons_show_what_comes_through_the_new_parts():
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
    from diffusers_graft.training.noised_batch import Noising

    noised = Noising(scheduler=SCHEDULER)(model, batches()[0], generator)
    seen = []
    model.transformer_blocks[1].attn1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(**noised.inputs)
    torch.testing.assert_close(seen[0], heard["sequential"])


def test_sequential_lessons_pass_over_a_part_that_is_never_called():
    model = tiny_dit()
    model.transformer_blocks[3].forward = lambda hidden_states, **_: hidden_states
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[:]": "hyena_x"}))
    config = dg.DistillConfig(steps=3, mode="sequential", sites="self_attention[:3]", progress=False)
    assert len(dg.distill(model, graft, batches(2), config, noise_scheduler=SCHEDULER)) == 3


def test_sequential_lessons_leave_a_smaller_error_of_the_whole():
    gaps = {}
    for mode in ("parallel", "sequential"):
        model, before = tiny_dit(), predict(tiny_dit())
        model, graft, _ = teach(
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
def test_reuse_takes_steps_from_memory(reuse):
    model = tiny_dit()
    counts = calls_of(model)
    _, _, reports = teach({"self_attention[:]": HYENA}, model, steps=16, reuse=reuse, ring=4)
    assert all(len(report.losses) == 16 for report in reports.values())
    assert counts[0] == 16 // reuse + 1  # one more to see how much a batch takes


def test_groups_fit_their_memory_and_finish_early_in_the_teacher():
    model = tiny_dit()
    counts = calls_of(model)
    one_call = 2 * 8 * 16 * 16 * 4  # input and output of 8 samples of 16 tokens of width 16, in float32
    limit = 4 * 2 * one_call  # two sites, four batches
    with PeakMemory() as memory:
        _, _, reports = teach({"self_attention[:]": HYENA}, model, steps=16, reuse=4, ring=4, memory=limit)
    assert all(len(report.losses) == 16 for report in reports.values())
    assert counts == [1 + 4 + 4, 1 + 4 + 4, 1 + 4, 1 + 4]
    with PeakMemory() as roomy:
        teach({"self_attention[:]": HYENA}, tiny_dit(), steps=16, reuse=4, ring=4)
    assert roomy.peak - memory.peak > 0.9 * limit
    with pytest.raises(TrainingError, match="reuse may keep 1,000"):
        teach({"self_attention[:]": HYENA}, steps=4, reuse=4, memory=1000)


def test_reuse_on_the_host_and_with_context():
    _, _, reports = teach({"self_attention[:]": "neighborhood"}, steps=4, reuse=2, ring=2, host=True)
    assert all(len(report.losses) == 4 for report in reports.values())


@pytest.mark.parametrize("mixed", ["bf16", "fp16"])
def test_mixed_precision_keeps_weights_and_stays_close(mixed):
    runs = {
        precision: teach({"self_attention[1]": HYENA}, steps=20, precision=precision) for precision in ("no", mixed)
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
    _, one, _ = teach({"self_attention[1]": HYENA}, model, [whole], loss="l2")
    _, two, _ = teach({"self_attention[1]": HYENA}, model, halves, loss="l2", accumulate=2)
    for name, tensor in one.tensors(model).items():
        torch.testing.assert_close(tensor, two.tensors(model)[name], rtol=1e-4, atol=1e-5)


def test_prompts_are_dropped_where_there_is_a_null_prompt():
    from diffusers_graft.inspection import example_inputs
    from diffusers_graft.training.noised_batch import Noising

    model = tiny_pixart()
    conditions = example_inputs(model, batch_size=400)
    batch = {
        "sample": conditions["hidden_states"],
        "encoder_hidden_states": conditions["encoder_hidden_states"],
        "encoder_attention_mask": conditions["encoder_attention_mask"],
    }
    null = {"encoder_hidden_states": torch.full((1, 12, 10), 7.0), "encoder_attention_mask": torch.zeros(1, 12)}
    noising = Noising(scheduler=SCHEDULER, null_prompt=null, prompt_dropout=0.25)
    inputs = noising(model, batch, torch.Generator().manual_seed(0)).inputs
    dropped = (inputs["encoder_hidden_states"] == 7).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(inputs["encoder_attention_mask"].any(1), ~dropped)
    with pytest.raises(TrainingError, match="same length"):
        Noising(scheduler=SCHEDULER, null_prompt={"encoder_hidden_states": torch.zeros(1, 3, 10)})(
            model, batch, torch.Generator()
        )
    wrong = {"sample": batch["sample"][:4]} | {k: v[:4] for k, v in batch.items() if k != "sample"}
    wrong["added_cond_kwargs"] = conditions["added_cond_kwargs"]
    teach({"self_attention[1]": HYENA}, model, [wrong], null_prompt=null)


def test_the_journal_says_how_it_went(tmp_path):
    teach(
        {"self_attention[1]": HYENA},
        steps=6,
        log_every=2,
        evaluate_every=2,
        held_out=batches(1, seed=9),
        output_dir=tmp_path,
    )
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert rows[-1]["stage"] == "one"
    assert set(rows[-1]["sites"]["self_attention[1]"]) == {"loss", "error", "cosine", "held_out"}
    assert rows[-1]["samples_per_second"] > 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_tells_loss_throughput_and_time_left(monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    teach({"self_attention[1]": HYENA}, steps=3, log_every=1, progress=True)
    said = terminal.getvalue()
    assert "stage one: 100%" in said
    assert "loss=" in said
    assert "samples_per_second=" in said
    assert "<00:0" in said


def test_callbacks_are_called_and_may_stop_the_run(tmp_path):
    class Watcher:
        events = []

        def __getattr__(self, event):
            return lambda args, state, control, **details: self.hear(event, state, control, details)

        def hear(self, event, state, control, details):
            self.events.append(event)
            control.should_training_stop = state.global_step >= 3

    _, _, reports = teach(
        {"self_attention[1]": HYENA}, steps=9, log_every=1, callbacks=[watcher := Watcher()], output_dir=tmp_path
    )
    assert len(reports["self_attention[1]"].losses) == 3
    assert watcher.events[0] == "on_train_begin"
    assert watcher.events[-2:] == ["on_save", "on_train_end"]
    assert watcher.events.count("on_step_end") == watcher.events.count("on_log") == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": {"self_attention[0]": "l3"}},
        {"mode": "backwards"},
        {"precision": "fp8"},
        {"optimizer": "Adam W"},
        {"schedule": "sine"},
    ],
    ids=str,
)
def test_unknown_settings_are_refused_with_what_there_is(settings):
    with pytest.raises(UnknownNameError, match="Available"):
        dg.DistillConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 2.5},
        {"lr": "1e-4"},
        {"warmup": -5},
        {"max_grad_norm": -1.0},
        {"max_grad_norm": float("nan")},
        {"prompt_dropout": 7},
        {"lr": float("nan")},
        {"schedule": "piecewise_constant"},
        {"schedule_args": {"typo": 1}},
        {"schedule": "polynomial", "lr": 1e-8},
    ],
    ids=str,
)
def test_impossible_numbers_are_refused(settings):
    with pytest.raises(TrainingError, match=r"got DistillConfig|does not take these settings"):
        dg.DistillConfig(**settings)


def test_settings_by_site_and_grafts_have_sites():
    with pytest.raises(
        TrainingError, match=r"'feed_forward\[0\]' names none of the graft's sites: it has self_attention\[0\]"
    ):
        teach({"self_attention[0]": HYENA}, loss={"feed_forward[0]": "l1"})
    model = tiny_dit()
    graft = dg.build_graft(model, dg.GraftPlan(type(model).__name__, ()))
    assert str(graft) == ""
    with pytest.raises(TrainingError, match="replaces nothing"):
        dg.distill(model, graft, batches(), dg.DistillConfig(steps=1, progress=False), noise_scheduler=SCHEDULER)


def test_impossible_settings_are_refused():
    with pytest.raises(TrainingError, match="does not take these settings"):
        teach({"self_attention[0]": HYENA}, optimizer_args={"betas": (0.9,)})
    with pytest.raises(TrainingError, match="choose one of them"):
        dg.DistillConfig(reuse=2, mode="sequential")
    with pytest.raises(TrainingError, match="does not take these settings"):
        teach({"self_attention[0]": HYENA}, optimizer_args={"momentum": 2})


@pytest.mark.parametrize("verb", ["distill", "closed_form", "finetune", "evaluate", "survey"])
def test_a_pipeline_is_told_apart_from_its_transformer(verb):
    class Pipeline(DiffusionPipeline):
        def __init__(self, transformer):
            super().__init__()
            self.register_modules(transformer=transformer)

    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[0]": "hyena_x"}))
    given = {"distill": [graft], "closed_form": [graft], "survey": [{"self_attention[0]": ["hyena_x"]}]}.get(verb, [])
    with pytest.raises(ModelError, match="pass its transformer, pipe.transformer"):
        getattr(dg, verb)(Pipeline(model), *given, batches(1), noise_scheduler=SCHEDULER)
