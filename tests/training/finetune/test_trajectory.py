"""States of the grafted model's own sampling."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.training.finetune.trajectory import distribution_loss, reach_by_sampling
from diffusers_graft.training.noised_batch import Noising

from ...models import SCHEDULER, batches, tiny_dit
from ..runs import grafted_model, run_finetune, weights_of

STEPS = 3


def euler(model, state, ends, labels):
    """x + (sigma' - sigma) v, sample by sample."""
    states = []
    for x, end, label in zip(state, ends, labels, strict=True):
        x, sigmas = x[None], torch.linspace(1.0, end / 1000, STEPS + 1)
        for sigma, later in zip(sigmas[:-1], sigmas[1:], strict=True):
            x = x + (later - sigma) * model(x, timestep=sigma[None] * 1000, class_labels=label[None]).sample
        states.append(x)
    return torch.cat(states)


def ddim(model, state, ends, labels, kind):
    """DDIM without noise (arXiv 2010.02502, Eq. 12), in steps that go evenly from the last timestep to the sample's."""
    kept = DDPMScheduler().alphas_cumprod
    states = []
    for x, end, label in zip(state, ends, labels, strict=True):
        x, shares = x[None], torch.linspace(1.0, (end.item() + 0.5) / 1000, STEPS + 1)
        times = (shares * 1000).long().clamp(max=999)
        for t, later in zip(times[:-1], times[1:], strict=True):
            a, s = kept[t].sqrt(), (1 - kept[t]).sqrt()
            answer = model(x, timestep=t[None].float(), class_labels=label[None]).sample[:, :1]
            noise = {"epsilon": answer, "v_prediction": s * x + a * answer, "sample": (x - a * answer) / s}[kind]
            x = kept[later].sqrt() * (x - s * noise) / a + (1 - kept[later]).sqrt() * noise
        states.append(x)
    return torch.cat(states)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction", "sample"])
def test_states_are_those_of_the_solver_by_hand(kind):
    scheduler = FlowMatchEulerDiscreteScheduler() if kind == "flow" else DDPMScheduler(prediction_type=kind)
    model = tiny_dit(out_channels=2 if kind == "epsilon" else 1)  # one that predicts variances, too
    noised = Noising(scheduler=scheduler)(model, batches(1)[0], torch.Generator().manual_seed(0))
    reached, step = reach_by_sampling(model, noised, scheduler, STEPS)
    ends, labels = noised.timestep, noised.inputs["class_labels"]
    with torch.no_grad():
        if kind == "flow":
            expected = euler(model, noised.noise, ends, labels)
        else:
            expected = ddim(model, noised.noise, ends, labels, kind)
    torch.testing.assert_close(reached.noisy, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(reached.inputs["timestep"], noised.inputs["timestep"])
    assert torch.equal(step.take(model, scheduler), reached.noisy)
    assert reached.target is None


def test_a_trajectory_needs_no_data_and_learns_from_the_ungrafted_model_alone():
    results = []
    for scale in (0.0, 1.0):
        model = grafted_model()
        data = [{**batch, "sample": scale * batch["sample"]} for batch in batches(2)]
        losses = run_finetune(model, data, denoising=0, distill_output=1.0, trajectory=2)
        results.append(weights_of(model))
    assert torch.equal(*results)
    model = grafted_model()
    noised = Noising(scheduler=SCHEDULER)(model, data[0], torch.Generator().manual_seed(0))
    inputs = reach_by_sampling(model, noised, SCHEDULER, 2)[0].inputs
    with torch.no_grad():
        distance = (model(**inputs).sample - tiny_dit()(**inputs).sample).square().mean().item()
    assert losses[0] == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction"])
def test_distributions_are_matched_along_the_difference_of_both_scores(kind):
    scheduler = FlowMatchEulerDiscreteScheduler() if kind == "flow" else DDPMScheduler(prediction_type=kind)
    model = grafted_model()
    noised = Noising(scheduler=scheduler)(model, batches(1)[0], torch.Generator().manual_seed(0))
    noised, step = reach_by_sampling(model, noised, scheduler, STEPS)
    state = noised.noisy
    with torch.no_grad():
        student = model(**noised.inputs).sample
        teacher = tiny_dit()(**noised.inputs).sample
    if kind == "flow":
        t = noised.timestep.view(-1, 1, 1, 1) / 1000
        scores = [-(state + (1 - t) * velocity) / t for velocity in (student, teacher)]
        sigma = t
        # As the paper writes it.
        torch.testing.assert_close(scores[1] - scores[0], -(1 - t) / t * (teacher - student), rtol=1e-3, atol=1e-5)
    else:
        signal = scheduler.alphas_cumprod[noised.timestep].view(-1, 1, 1, 1)
        sigma = (1 - signal).sqrt()
        noises = (student, teacher)
        if kind == "v_prediction":
            noises = [sigma * state + signal.sqrt() * velocity for velocity in noises]
        scores = [-noise / sigma for noise in noises]
    reached = step.take(model, scheduler)
    loss = distribution_loss(model, scheduler, noised, reached, student, teacher)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    # KL(q || p) falls along the scores' difference at samples of q.
    direction = sigma * (scores[0] - scores[1]) / state.numel()
    expected = torch.autograd.grad((reached * direction).sum(), parameters, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found)
    for gradient, by_hand in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, by_hand, rtol=2e-3, atol=1e-6)


def test_a_graft_that_matches_distributions_alone_comes_nearer_to_the_ungrafted_model():
    model = grafted_model()

    @torch.no_grad()
    def distance():
        noised = Noising(scheduler=SCHEDULER)(model, batches(1)[0], torch.Generator().manual_seed(0))
        inputs = reach_by_sampling(model, noised, SCHEDULER, 3)[0].inputs
        return (model(**inputs).sample - tiny_dit()(**inputs).sample).square().mean().item()

    before = distance()
    settings = {"denoising": 0, "distill_output": 0, "distill_features": 0.0, "trajectory": 3}
    run_finetune(model, batches(1), steps=60, lr=3e-4, match_distribution=1.0, **settings)
    assert distance() < 0.5 * before


def test_trajectories_without_teacher_or_noise_are_refused():
    with pytest.raises(TrainingError, match="set trajectory to some steps"):
        dg.FinetuneConfig(match_distribution=1.0)
    with pytest.raises(TrainingError, match="match_distribution are not negative"):
        dg.FinetuneConfig(match_distribution=-1.0, trajectory=2)
    with pytest.raises(TrainingError, match="denoising=0"):
        dg.FinetuneConfig(trajectory=4, denoising=1.0)
    with pytest.raises(TrainingError, match="whole number"):
        dg.FinetuneConfig(trajectory=1.5, denoising=0, distill_output=1.0)
    model = grafted_model()
    inputs = Noising(scheduler=SCHEDULER)(model, batches()[0], torch.Generator().manual_seed(0)).inputs
    with pytest.raises(TrainingError, match="trajectory begins at noise"):
        run_finetune(model, [inputs], denoising=0, distill_output=1.0, trajectory=2)
