"""Objectives of stage two against their papers' formulas, and what else stage two can be told."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.embeddings import LabelEmbedding
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError, UnknownNameError
from diffusers_graft.training.finetune.objective import objective, snr_weight
from diffusers_graft.training.finetune.teacher import masked_error
from diffusers_graft.training.fsdp import find_blocks
from diffusers_graft.training.metrics_log import read_metrics
from diffusers_graft.training.noised_batch import NoisedBatch, Noising

from ...models import SCHEDULER, batches, predict, tensors_of, tiny_dit, tiny_pixart

HYENA = {"operator": "hyena_x", "init": "random"}


def settle(model, data=None, scheduler=SCHEDULER, **settings):
    common = {"steps": 3, "lr": 1e-3, "progress": False}
    more = {name: settings.pop(name) for name in ("output_dir", "callbacks") if name in settings}
    return dg.finetune(
        model, data or batches(), dg.FinetuneConfig(**{**common, **settings}), noise_scheduler=scheduler, **more
    )


def grafted(make=tiny_dit, rules=None):
    model = make()
    model.set_graft(rules or {"self_attention[1::2]": HYENA})
    return model


class Original:
    """Training losses of guided diffusion, as DiT uses them: `create_diffusion(learn_sigma=True)`, in numpy.

    https://github.com/facebookresearch/DiT/blob/main/diffusion/gaussian_diffusion.py
    """

    def __init__(self, steps=1000):
        self.betas = np.linspace(0.0001, 0.02, steps, dtype=np.float64)
        alphas = 1.0 - self.betas
        self.kept = np.cumprod(alphas)
        self.kept_prev = np.append(1.0, self.kept[:-1])
        self.posterior_variance = self.betas * (1.0 - self.kept_prev) / (1.0 - self.kept)
        self.posterior_log_variance_clipped = np.log(
            np.append(self.posterior_variance[1], self.posterior_variance[1:])
        )
        self.coef1 = self.betas * np.sqrt(self.kept_prev) / (1.0 - self.kept)
        self.coef2 = (1.0 - self.kept_prev) * np.sqrt(alphas) / (1.0 - self.kept)

    def losses(self, x_start, x_t, noise, t, output):
        eps, values = np.split(output, 2, axis=1)
        at = lambda array: array[t][:, None, None, None]  # noqa: E731
        true_mean = at(self.coef1) * x_start + at(self.coef2) * x_t
        true_log = at(self.posterior_log_variance_clipped)
        frac = (values + 1) / 2
        log_variance = frac * at(np.log(self.betas)) + (1 - frac) * true_log
        pred = at(np.sqrt(1.0 / self.kept)) * x_t - at(np.sqrt(1.0 / self.kept - 1)) * eps
        mean = at(self.coef1) * pred + at(self.coef2) * x_t
        kl = 0.5 * (
            -1.0
            + log_variance
            - true_log
            + np.exp(true_log - log_variance)
            + ((true_mean - mean) ** 2) * np.exp(-log_variance)
        )
        nll = -self.discretized(x_start, mean, 0.5 * log_variance)
        flat = lambda array: array.reshape(len(array), -1).mean(1)  # noqa: E731
        vb = np.where(t == 0, flat(nll), flat(kl)) / np.log(2.0)
        return flat((noise - eps) ** 2), vb

    def discretized(self, x, means, log_scales):
        x, means, log_scales = (
            array.astype(np.float32) for array in (x, means, log_scales)
        )  # as the original has them
        centered, inv = x - means, np.exp(-log_scales)
        cdf = lambda v: 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (v + 0.044715 * v**3)))  # noqa: E731
        plus, minus = cdf(inv * (centered + 1.0 / 255.0)), cdf(inv * (centered - 1.0 / 255.0))
        log = lambda v: np.log(np.maximum(v, 1e-12))  # noqa: E731
        return np.where(x < -0.999, log(plus), np.where(x > 0.999, log(1.0 - minus), log(plus - minus)))


def learned_sigma_batch():
    generator = torch.Generator().manual_seed(0)
    sample = torch.rand(6, 2, 4, 4, generator=generator) * 2 - 1
    sample[0, 0, 0] = torch.tensor([-1.0, 1.0, 0.0, 0.5])
    noise = torch.randn(sample.shape, generator=generator)
    timestep = torch.tensor([0, 0, 1, 30, 500, 999])
    output = torch.randn(6, 4, 4, 4, generator=generator)
    noised = SCHEDULER.add_noise(sample, noise, timestep)
    return NoisedBatch({"hidden_states": noised, "timestep": timestep}, noise, sample, timestep), output


def test_learned_sigma_is_the_original_mse_plus_vb():
    noised, output = learned_sigma_batch()
    x_t = noised.inputs["hidden_states"].double().numpy()
    original = Original().losses(
        noised.sample.double().numpy(),
        x_t,
        noised.target.double().numpy(),
        noised.inputs["timestep"].numpy(),
        output.double().numpy(),
    )
    for number in range(6):  # sample by sample, since the first step's likelihood is far larger than the rest
        one = NoisedBatch(
            {name: value[[number]] for name, value in noised.inputs.items()},
            noised.target[[number]],
            noised.sample[[number]],
            noised.timestep[[number]],
        )
        loss = objective(output[[number]], one, SCHEDULER).item()
        assert loss == pytest.approx(original[0][number] + original[1][number], rel=2e-3), number


def test_the_variational_bound_moves_variances_alone():
    noised, output = learned_sigma_batch()
    gradients = {}
    for variance in ("ignore", "vb"):
        prediction = output.clone().requires_grad_()
        objective(prediction, noised, SCHEDULER, variance=variance).backward()
        gradients[variance] = prediction.grad
    torch.testing.assert_close(gradients["vb"][:, :2], gradients["ignore"][:, :2])
    assert not gradients["ignore"][:, 2:].any()
    assert gradients["vb"][:, 2:].any()


def test_variances_are_learned_where_the_original_was_taught_so():
    noised, output = learned_sigma_batch()
    assert objective(output, noised, SCHEDULER) == objective(output, noised, SCHEDULER, variance="vb")
    flow = FlowMatchEulerDiscreteScheduler()
    assert objective(output, noised, flow) == objective(output, noised, flow, variance="ignore")
    plain = torch.nn.functional.mse_loss(output[:, :2], noised.target).item()
    assert objective(output[:, :2], noised, SCHEDULER).item() == pytest.approx(plain)
    with pytest.raises(TrainingError, match='use "ignore"'):
        objective(output, noised, flow, variance="vb")
    with pytest.raises(UnknownNameError):
        dg.FinetuneConfig(variance="learn")


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr_is_the_papers_on_the_clean_sample(kind):
    """min(SNR, gamma) |x0 - x0'|^2, whatever is predicted (arXiv 2303.09556, Eq. 7)."""
    scheduler, gamma = DDPMScheduler(prediction_type=kind), 5.0
    sample = torch.randn(4, 1, 4, 4)
    noised = Noising(scheduler=scheduler)(tiny_dit(), {"sample": sample}, torch.Generator().manual_seed(0))
    prediction = torch.randn_like(sample)
    kept = scheduler.alphas_cumprod[noised.timestep].view(-1, 1, 1, 1)
    a, s, x_t = kept.sqrt(), (1 - kept).sqrt(), noised.inputs["hidden_states"]
    clean = {"epsilon": (x_t - s * prediction) / a, "sample": prediction, "v_prediction": a * x_t - s * prediction}[
        kind
    ]
    weight = (kept / (1 - kept)).clamp(max=gamma)
    expected = (weight * (clean - sample).square()).mean()
    torch.testing.assert_close(objective(prediction, noised, scheduler, min_snr=gamma), expected, rtol=1e-3, atol=1e-4)


def test_min_snr_of_flow_matching():
    scheduler, gamma = FlowMatchEulerDiscreteScheduler(), 5.0
    sigma = torch.tensor([0.1, 0.5, 0.9])
    weight = snr_weight(scheduler, 1000 * sigma, gamma)
    torch.testing.assert_close(weight, ((1 - sigma) / sigma).square().clamp(max=gamma) * sigma.square())
    ones = torch.ones(1, 1, 2, 2)
    for noised, known in ((NoisedBatch({}, ones), scheduler), (NoisedBatch({}, ones, ones), None)):
        with pytest.raises(TrainingError, match="noise_scheduler="):
            objective(ones, noised, known, min_snr=5.0)


SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler(),
    "v": DDPMScheduler(prediction_type="v_prediction"),
    "epsilon": SCHEDULER,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"distill_output": 1.0},
        {"distill_features": 0.5},
        {"distill_output": 1.0, "distill_features": 1.0, "train": "operators"},
        {"gradient_checkpointing": True, "distill_features": 0.5},
        {"compile": "eager"},
        {"precision": "bf16"},
        {"min_snr": 5.0},
        {"optimizer": "RAdam", "schedule": "cosine", "weight_decay": 0.1},
        {"accumulate": 2, "ema_decay": 0.9},
        {"train": "operators+lora"},
        {"train": "operators+lora", "lora": LoraConfig(r=2, target_modules=["to_q"]), "distill_output": 1.0},
    ],
    ids=str,
)
def test_every_way_of_stage_two_learns_and_leaves_no_trace(settings):
    model = grafted()
    start, checkpointed = predict(model), model.is_gradient_checkpointing
    model.disable_graft()
    before, tensors = predict(model), tensors_of(model)
    model.enable_graft()
    losses = settle(model, **settings)
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert not torch.equal(predict(model), start)
    assert model.is_gradient_checkpointing == checkpointed
    assert not any(module._forward_hooks for module in model.modules())
    model.unset_graft()
    assert torch.equal(predict(model), before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("make", [tiny_dit, lambda: tiny_dit(out_channels=2)], ids=["plain", "learned sigma"])
def test_every_objective_trains(name, make):
    model = grafted(make)
    losses = settle(model, batches(1, size=16), SCHEDULERS[name], steps=60, lr=3e-3)
    assert sum(losses[-15:]) < sum(losses[:15])


def test_pixart_with_learned_sigma_and_features():
    from diffusers_graft.inspection import example_inputs

    model = grafted(tiny_pixart)
    conditions = example_inputs(model, batch_size=4)
    batch = {"sample": conditions.pop("hidden_states"), **{k: v for k, v in conditions.items() if k != "timestep"}}
    assert len(settle(model, [batch], distill_features=1.0, distill_output=1.0, train="operators")) == 3


def test_the_teacher_is_the_untrained_model_also_where_all_weights_train():
    """After some steps of everything, the distance to the teacher is that to the original, computed by itself."""
    model = grafted()
    settle(model, steps=4, lr=1e-2)
    from diffusers_graft.training.finetune.teacher import Teacher

    inputs = Noising(scheduler=SCHEDULER)(model, batches()[0], torch.Generator().manual_seed(0)).inputs
    teacher = Teacher(model, output_weight=1.0)
    teacher.run(inputs)
    with torch.no_grad():
        assert torch.equal(teacher.prediction, tiny_dit()(**inputs).sample)


def test_distillation_brings_the_model_back_to_its_teacher():
    distances = {}
    before = predict(tiny_dit())
    for weight in (0.0, 10.0):
        model = grafted()
        settle(model, batches(1, size=16), steps=80, lr=2e-3, distill_output=weight)
        distances[weight] = (predict(model) - before).norm()
    assert distances[10.0] < distances[0.0]


def test_massive_activations_are_left_out():
    teacher = torch.randn(2, 16, 8)
    student = teacher + 0.1
    expected = 0.01
    teacher[0, 0, 0], student[0, 0, 0] = 1000.0, -1000.0
    assert masked_error(student, teacher).item() == pytest.approx(expected, rel=1e-4)
    assert torch.nn.functional.mse_loss(student, teacher) > 1000
    halves = [masked_error(one, other).item() for one, other in zip(student.split(1), teacher.split(1), strict=True)]
    assert masked_error(student, teacher).item() == pytest.approx(sum(halves) / 2)  # however a batch is shared out
    model = grafted()
    assert find_blocks(model, model.graft.sites) == [f"transformer_blocks.{i}" for i in range(4)]


def test_checkpointed_gradients_are_the_same():
    results = []
    for checkpointing in (False, True):
        model = grafted()
        settle(model, gradient_checkpointing=checkpointing, distill_features=1.0)
        results.append(predict(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_lora_of_rank_64_is_the_default_beside_operators():
    model = grafted()
    settle(model, train="operators+lora")
    assert model.graft.adapter_config.r == 64
    assert len(model.graft.adapters) > 4
    row = model.graft.history[-1]
    assert row["lora"] == {"r": 64, "alpha": 64}


def test_what_distillation_costs_stands_in_the_journal(tmp_path):
    settle(grafted(), output_dir=tmp_path, log_every=1, distill_output=1.0, distill_features=1.0)
    rows = read_metrics(tmp_path)
    assert [set(row["terms"]) for row in rows] == [{"denoising", "output", "features"}] * 3
    assert all(term > 0 for row in rows for term in row["terms"].values())
    assert rows[0]["loss"] == pytest.approx(sum(rows[0]["terms"].values()), rel=1e-5)
    assert all(0 < row["lr"] <= 1e-3 for row in rows)


def test_the_compiled_model_is_the_one_that_runs(monkeypatch):
    backends, calls = [], []

    def compiled(model, **backend):
        backends.append(backend)
        return lambda *args, **kwargs: calls.append(1) or model(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiled)
    for choice in (True, "eager"):
        settle(grafted(), compile=choice, steps=1)
    assert (backends, calls) == ([{}, {"backend": "eager"}], [1, 1])


def test_trackers_are_accelerates(tmp_path, monkeypatch):
    from accelerate import tracking

    from diffusers_graft.training import session as run

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory = "fake", True
        rows, said = [], []

        def __init__(self, run_name, logging_dir):
            super().__init__(_blank=True)
            self.said += [run_name, str(logging_dir)]

        def store_init_configuration(self, values):
            self.said.append(values["steps"])

        def log(self, values, step, **kwargs):
            self.rows.append((step, values))

        def finish(self):
            self.said.append("finished")

    monkeypatch.setattr(run, "get_available_trackers", lambda: ["fake"])
    monkeypatch.setattr(run, "LOGGER_TYPE_TO_CLASS", {"fake": Fake})
    settle(grafted(), output_dir=tmp_path, log_every=1, trackers=("fake",))
    assert Fake.said == ["stage-two", str(tmp_path / "logs"), 3, "finished"]
    assert [step for step, _ in Fake.rows] == [1, 2, 3]
    assert "two/loss" in Fake.rows[0][1]
    monkeypatch.setattr(run, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    monkeypatch.setattr(run, "LOGGER_TYPE_TO_CLASS", {"tensorboard": Fake})
    settle(grafted(), output_dir=tmp_path / "usual", log_every=1)
    assert len(Fake.rows) == 6  # tensorboard unasked, wandb only by name
    monkeypatch.setattr(run, "get_available_trackers", list)
    with pytest.raises(UnknownNameError, match="installed tracker"):
        settle(grafted(), output_dir=tmp_path / "other", trackers=("wandb",))


def test_a_teacher_does_not_bring_back_the_dice_of_labels_in_a_grafted_block():
    model, training = grafted(rules={"block_pair[0]": "parallel"}), []

    class Watcher:
        def on_step_end(self, args, state, control, **_):
            training.extend(module.training for module in model.modules() if isinstance(module, LabelEmbedding))

    settle(model, steps=2, distill_output=1.0, callbacks=[Watcher()])
    assert training
    assert not any(training)
