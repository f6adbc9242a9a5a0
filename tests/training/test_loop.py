"""The loop of both stages, and runs that are killed and resumed."""

import errno
import functools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.core import storage
from diffusers_graft.errors import FileError, ModelError, TrainingError
from diffusers_graft.inspection import predict as answer
from diffusers_graft.training.checkpoint import Checkpoints
from diffusers_graft.training.metrics_log import read_metrics

from ..inspection.models import inputs_of, tiny
from ..models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart
from .killed import STEPS, run
from .runs import RANDOM, StopAt, StopError, build, distill_config, finetune_config, same


def test_training_is_reproducible():
    results = []
    for _ in range(2):
        model, graft = build({"self_attention[1]": RANDOM})
        dg.distill(model, graft, batches(), distill_config(), noise_scheduler=SCHEDULER)
        model.set_graft(graft)
        dg.finetune(model, batches(), finetune_config(), noise_scheduler=SCHEDULER)
        results.append(predict(model))
        torch.rand(3)
    assert torch.equal(*results)


def test_both_stages_of_pixart():
    from diffusers_graft.inspection import example_inputs

    model = tiny_pixart()
    conditions = example_inputs(model, batch_size=4)
    batch = {"sample": conditions.pop("hidden_states"), **{k: v for k, v in conditions.items() if k != "timestep"}}
    graft = dg.build_graft(
        model, dg.plan_graft(model, {"self_attention[1::2]": "neighborhood", "cross_attention[0]": RANDOM})
    )
    reports = dg.distill(model, graft, [batch], distill_config(80), noise_scheduler=SCHEDULER)
    assert all(sum(report.losses[-10:]) < sum(report.losses[:10]) for report in reports.values())
    model.set_graft(graft)
    assert len(dg.finetune(model, [batch], finetune_config(), noise_scheduler=SCHEDULER)) == 3


def test_both_stages_of_a_model_that_returns_lists():
    model, inputs = tiny("ZImageTransformer2DModel"), inputs_of("ZImageTransformer2DModel")
    batch = {"sample": torch.stack(inputs["x"]), "cap_feats": inputs["cap_feats"]}
    graft, flow = (
        dg.build_graft(model, dg.plan_graft(model, {"self_attention[:]": "hyena_x"})),
        FlowMatchEulerDiscreteScheduler(),
    )
    reports = dg.distill(model, graft, [batch], distill_config(20), noise_scheduler=flow)
    assert all(sum(report.losses[-5:]) < sum(report.losses[:5]) for report in reports.values())
    model.set_graft(graft)
    assert len(dg.finetune(model, [batch], finetune_config(), noise_scheduler=flow)) == 3
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
def test_both_stages_of_models_with_unusual_forwards(name, kind):
    model, inputs = tiny(name), inputs_of(name)
    graft = dg.build_graft(model, dg.plan_graft(model, {f"{kind}[0]": "self_attention"}))
    with torch.no_grad():
        batch = {**inputs, "target": torch.zeros_like(answer(model, inputs))}
    (report,) = dg.distill(model, graft, [batch], distill_config(1)).values()
    model.set_graft(graft)
    losses = dg.finetune(model, [batch], finetune_config(1, distill_output=1.0))
    assert torch.tensor([*report.losses, *losses]).isfinite().all()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_both_stages_train_inside_no_grad_and_inference_mode(around):
    model, plain = tiny_dit(), tiny_dit()
    for one, context in ((model, around), (plain, torch.enable_grad)):
        with context():
            graft = dg.build_graft(one, dg.plan_graft(one, {"self_attention[1]": "hyena_x", "feed_forward[0]": "mlp"}))
            dg.closed_form(one, graft, batches(), dg.ClosedFormConfig(steps=1), noise_scheduler=SCHEDULER)
            dg.distill(one, graft, batches(), distill_config(2), noise_scheduler=SCHEDULER)
        one.set_graft(graft)
        with context():
            dg.finetune(one, batches(), finetune_config(2), noise_scheduler=SCHEDULER)
    assert same_tensors(model, tensors_of(plain))


@pytest.mark.parametrize("verb", ["distill", "closed_form", "finetune", "evaluate", "survey"])
def test_a_pipeline_in_place_of_its_transformer_is_refused(verb):
    class Pipeline(DiffusionPipeline):
        def __init__(self, transformer):
            super().__init__()
            self.register_modules(transformer=transformer)

    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[0]": "hyena_x"}))
    given = {"distill": [graft], "closed_form": [graft], "survey": [{"self_attention[0]": ["hyena_x"]}]}.get(verb, [])
    with pytest.raises(ModelError, match="pass its transformer, pipe.transformer"):
        getattr(dg, verb)(Pipeline(model), *given, batches(1), noise_scheduler=SCHEDULER)


ROOT = Path(__file__).parents[2]


@functools.cache
def uninterrupted(stage):
    return run(stage)


def kill(*arguments):
    done = subprocess.run([sys.executable, "-m", "tests.training.killed", *map(str, arguments)], cwd=ROOT, check=False)
    assert done.returncode == -9


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_killed_at_a_random_step_resumes_bit_equal(stage, tmp_path):
    step = random.SystemRandom().randrange(3, STEPS)  # any step must do
    kill(stage, tmp_path, step)
    assert Checkpoints(tmp_path / ".checkpoints", stage, 2).steps(), step
    tensors, result = run(stage, tmp_path, resume=True)
    expected, expected_result = uninterrupted(stage)
    assert same(tensors, expected), step
    assert result == expected_result
    rows = [row["step"] for row in read_metrics(tmp_path)]
    assert rows == sorted(set(rows))
    assert rows[-1] == STEPS


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_ends_at_a_full_disk_and_goes_on_when_there_is_room(stage, tmp_path, monkeypatch):
    save_file = storage.save_file

    def full(tensors, path, **more):
        if saved.steps():
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **more)

    saved = Checkpoints(tmp_path / ".checkpoints", stage, 2)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        with pytest.raises(
            FileError, match=r"disk is full .* step 2 is intact; make room and run again with resume=True"
        ):
            run(stage, tmp_path)
    assert saved.steps() == [2]
    tensors, result = run(stage, tmp_path, resume=True)
    expected, expected_result = uninterrupted(stage)
    assert same(tensors, expected)
    assert result == expected_result


WAYS = {
    "reuse": {"reuse": 3, "ring": 2, "memory": 40_000},
    "sequential": {"mode": "sequential"},
    "correcting": {"mode": "correcting"},
    "accumulate": {"accumulate": 2},
    "sites": {"sites": "feed_forward[:]"},
    "momentum": {"optimizer": "SGD", "optimizer_args": {"momentum": 0.9}},
    "early": {"patience": 1, "evaluate_every": 1, "lr": 0.02, "schedule": "constant"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_setting_of_stage_one_resumes_bit_equal(way, tmp_path):
    def teach(folder, **settings):
        model = tiny_dit()
        rules = {
            "self_attention[1::2]": {"operator": "hyena_x", "init": "random"},
            "feed_forward[0]": {"operator": "mlp", "init": "random"},
        }
        graft = dg.build_graft(model, dg.plan_graft(model, rules))
        config = dg.DistillConfig(
            **{"steps": 7, "lr": 1e-3, "save_every": 1, "progress": False, "evaluate_every": 2, **WAYS[way]}
        )
        reports = dg.distill(
            model,
            graft,
            batches(3),
            config,
            noise_scheduler=SCHEDULER,
            held_out=batches(1, seed=5),
            output_dir=folder,
            **settings,
        )
        model.set_graft(graft)
        return {name: t.detach().clone() for name, t in graft.tensors(model).items()}, reports

    expected, expected_reports = teach(tmp_path / "whole")
    with pytest.raises(StopError):
        teach(tmp_path / "cut", callbacks=[StopAt(4)])
    tensors, reports = teach(tmp_path / "cut", resume=True)
    assert same(tensors, expected)
    assert reports == expected_reports
    assert same(teach(tmp_path / "cut", resume=True)[0], expected)  # of a finished run: nothing is left to do


LORA = LoraConfig(r=2, target_modules=["to_q"])


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "operators"},
        {"train": "operators+lora", "lora": LORA, "ema_decay": 0.5},
        {"distill_output": 1.0, "accumulate": 2},
        {"distill_output": 1.0, "denoising": 0, "trajectory": 2},
        {"distill_output": 0.0, "denoising": 0, "trajectory": 2, "match_distribution": 1.0},
        {"optimizer": "Adafactor", "schedule": "polynomial", "schedule_args": {"power": 2.0}},
    ],
    ids=str,
)
def test_every_setting_of_stage_two_resumes_bit_equal(settings, tmp_path):
    def settle(folder, **more):
        model = tiny_dit()
        model.set_graft({"self_attention[1::2]": "hyena_x"})
        config = dg.FinetuneConfig(**{"steps": 6, "lr": 1e-3, "save_every": 2, "progress": False, **settings})
        losses = dg.finetune(model, batches(3), config, noise_scheduler=SCHEDULER, output_dir=folder, **more)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, losses

    expected, expected_losses = settle(tmp_path / "whole")
    with pytest.raises(StopError):
        settle(tmp_path / "cut", callbacks=[StopAt(3)])
    tensors, losses = settle(tmp_path / "cut", resume=True)
    assert same(tensors, expected)
    assert losses == expected_losses


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_loss_that_is_nan_saves_the_last_good_state(stage, tmp_path):
    good, bad = batches(2)
    bad["sample"][0] = float("nan")

    def go(data, folder, **more):
        model = tiny_dit()
        graft = dg.build_graft(
            model, dg.plan_graft(model, {"self_attention[2]": {"operator": "hyena_x", "init": "random"}})
        )
        common = {"steps": 4, "lr": 1e-3, "progress": False}
        if stage == "one":
            dg.distill(
                model, graft, data, dg.DistillConfig(**common), noise_scheduler=SCHEDULER, output_dir=folder, **more
            )
            model.set_graft(graft)
        else:
            model.set_graft(graft)
            dg.finetune(model, data, dg.FinetuneConfig(**common), noise_scheduler=SCHEDULER, output_dir=folder, **more)
        return {name: t.detach().clone() for name, t in graft.tensors(model).items()}

    with pytest.raises(TrainingError, match="at step 2, batch 2"):
        go([good, good, bad], tmp_path)
    assert Checkpoints(tmp_path / ".checkpoints", stage, 2).steps() == [2]
    assert same(go([good], tmp_path, resume=True), go([good], tmp_path / "whole"))


class StopsAt:
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def test_blocks_with_labels_resume_bit_equal(tmp_path):
    def teach(**more):
        model = tiny_dit()
        graft = dg.build_graft(model, dg.plan_graft(model, {"block_pair[:]": "parallel"}))
        config = dg.DistillConfig(steps=4, warmup=0, lr=1e-3, progress=False)
        dg.distill(model, graft, batches(), config, noise_scheduler=SCHEDULER, output_dir=tmp_path, **more)
        return graft.tensors(model)

    whole = teach()
    teach(callbacks=[StopsAt(2)])
    assert same(teach(resume=True), whole)
