"""The optimizer of a stage."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import RuleError, TrainingError
from diffusers_graft.training.config import TrainingConfig, list_optimizers
from diffusers_graft.training.optimizer import StageOptimizer

from ..models import SCHEDULER, batches, predict, tiny_dit
from .runs import (
    HYENA,
    RANDOM,
    StopAt,
    StopError,
    build,
    distill_config,
    finetune_config,
    grafted_model,
    run_distill,
    run_finetune,
    same,
    weights_of,
)


@pytest.mark.parametrize("precision", ["fp16", "no"])
def test_weights_in_float16_are_not_trained(precision):
    model = tiny_dit().half()
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[1]": RANDOM}))
    with pytest.raises(TrainingError, match="first, with precision"):
        dg.distill(model, graft, batches(1), distill_config(1, precision=precision), noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match="first, with precision"):
        dg.finetune(model, batches(1), finetune_config(1, precision=precision), noise_scheduler=SCHEDULER)


class StopsAtTheEnd:
    def on_train_end(self, args, state, control, **_):
        raise KeyboardInterrupt


def test_the_average_is_in_place_before_a_callback_can_fail():
    outputs = []
    for callbacks in ([], [StopsAtTheEnd()]):
        model, graft = build({"self_attention[1]": RANDOM})
        model.set_graft(graft)
        try:
            dg.finetune(
                model,
                batches(1),
                finetune_config(2, lr=1e-2, ema_decay=0.9),
                noise_scheduler=SCHEDULER,
                callbacks=callbacks,
            )
        except KeyboardInterrupt:
            pass
        outputs.append(predict(model))
    assert torch.equal(*outputs)


STEPS, WARMUP = 20, 5
WITHOUT_DECAY = {"Rprop"}  # what torch says of it


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_of_torch_trains(name):
    weight = torch.nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = StageOptimizer(
        [weight], TrainingConfig(optimizer=name, lr=1e-2, schedule="constant", max_grad_norm=1e9)
    )
    for _ in range(5):
        optimizer.backward(weight.square().sum())
        optimizer.clip_gradients()
        optimizer.step()
    assert weight.square().sum() < 4 * 4 * 2.0**2
    if name in WITHOUT_DECAY:
        with pytest.raises(TrainingError, match="weight_decay"):
            StageOptimizer([weight], TrainingConfig(optimizer=name, lr=1e-2, weight_decay=0.1))


def test_weight_decay_reaches_the_optimizer():
    sizes = [
        weights_of(model).norm() for decay in (0.0, 10.0) if run_finetune(model := grafted_model(), weight_decay=decay)
    ]
    assert sizes[1] < sizes[0]


def test_every_step_has_the_learning_rate_of_the_schedule():
    weight, lengths = torch.nn.Parameter(torch.zeros(1)), []
    config = TrainingConfig(steps=STEPS, optimizer="SGD", lr=0.1, schedule="linear", warmup=WARMUP)
    optimizer = StageOptimizer([weight], config)
    for _ in range(STEPS):
        before, weight.grad = weight.item(), torch.ones(1)
        optimizer.step()
        lengths.append(before - weight.item())
    assert lengths == pytest.approx([0.1 * config.lr_factors()(step) for step in range(STEPS)], rel=1e-3)


def test_gradients_are_clipped_to_their_norm():
    """A step of plain descent is as long as the clipped gradient."""
    model = grafted_model()
    before = weights_of(model)
    run_finetune(model, steps=1, optimizer="SGD", lr=1.0, schedule="constant", max_grad_norm=1e-2)
    assert (weights_of(model) - before).norm().item() == pytest.approx(1e-2, rel=1e-3)


def test_the_average_is_the_one_of_every_steps_weights():
    class Watcher:
        seen = []

        def on_step_end(self, args, state, control, **_):
            self.seen.append(weights_of(model))

    model, decay = grafted_model(), 0.3
    expected = weights_of(model)
    run_finetune(model, steps=6, ema_decay=decay, callbacks=[watcher := Watcher()])
    for done, weights in enumerate(watcher.seen, 1):
        # diffusers' EMAModel: the first step is copied, then shares grow while there is little to average.
        now = min(decay, done / (done + 9)) if done > 1 else 0.0
        expected = now * expected + (1 - now) * weights
    torch.testing.assert_close(weights_of(model), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights_of(model), watcher.seen[-1])


def test_the_average_of_bfloat16_weights_is_in_float32():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = StageOptimizer([weight], TrainingConfig(lr=1e-4), ema_decay=0.999)
    optimizer.average.optimization_step = 10**6
    optimizer.set_weights([torch.full_like(weight, 1.25)])
    for _ in range(100):
        optimizer.step()
    assert optimizer.average.shadow_params[0].mean().item() == pytest.approx(1.25 - 0.25 * 0.999**100, rel=1e-4)


def bfloat16_model():
    model = tiny_dit().to(torch.bfloat16)
    model.set_graft({"feed_forward[1]": {"operator": "mlp", "expansion": 2, "init": "random"}})
    return model


def test_weights_in_bfloat16_are_trained_as_far_as_those_in_float32():
    """Thirty steps of a learning rate whose steps are below a digit of bfloat16."""
    settings = {"steps": 30, "lr": 1e-4, "warmup": 0, "schedule": "constant"}
    data, fallen, moved = batches(2, size=16), {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = bfloat16_model().to(dtype)
        before = weights_of(model)
        losses = run_finetune(model, data, **settings)
        fallen[dtype] = sum(losses[:6]) - sum(losses[-6:])
        moved[dtype] = (weights_of(model) != before).float().mean().item()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert fallen[torch.bfloat16] == pytest.approx(fallen[torch.float32], rel=0.15)
    assert moved[torch.bfloat16] > 0.8


def test_steps_that_bfloat16_rounds_away_add_up():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    config = TrainingConfig(optimizer="SGD", lr=1e-4, schedule="constant", steps=200)
    optimizer = StageOptimizer([weight], config)
    for _ in range(200):
        optimizer.backward(weight.sum() / 4)
        optimizer.clip_gradients()
        optimizer.step()
    assert weight.grad is None
    assert optimizer.masters[0].mean().item() == pytest.approx(1 - 200 * 1e-4 / 4, rel=1e-5)
    assert torch.equal(weight, optimizer.masters[0].to(torch.bfloat16))


def test_small_gradients_accumulate_beside_large_ones_in_bfloat16():
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = StageOptimizer([weight], TrainingConfig(lr=1e-4, accumulate=3))
    for factor in (3.0, 0.003, 0.003):
        optimizer.backward(factor * weight.sum())
    assert optimizer.masters[0].grad.item() == pytest.approx(1.002, rel=1e-3)


@pytest.mark.parametrize("stage", ["one", "two"])
def test_weights_in_bfloat16_resume_bit_equal(stage, tmp_path):
    def run(folder, **arguments):
        model = tiny_dit().to(torch.bfloat16)
        settings = {"steps": 5, "save_every": 2, "output_dir": folder, "warmup": 0, **arguments}
        if stage == "one":
            model, graft, _ = run_distill({"self_attention[1]": HYENA}, model, **settings)
            return graft.tensors(model)
        model.set_graft({"self_attention[1]": HYENA})
        run_finetune(model, ema_decay=0.5, **settings)
        return model.state_dict()

    expected = {name: tensor.clone() for name, tensor in run(tmp_path / "through").items()}
    with pytest.raises(StopError):
        run(tmp_path / "cut", callbacks=[StopAt(3)])
    assert same(run(tmp_path / "cut", resume=True), expected)


def test_weight_decay_spares_biases_and_norms():
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = StageOptimizer([bias, matrix], TrainingConfig(weight_decay=0.5, lr=0.1, schedule="constant"))
    optimizer.backward(0.0 * (matrix.sum() + bias.sum()))
    optimizer.clip_gradients()
    optimizer.step()
    assert torch.equal(bias, torch.ones(2))
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 1 - 0.1 * 0.5))


def steps_of(weights, gradients, optimizers):
    for gradient in gradients:
        for weight, value in zip(weights, gradient, strict=True):
            weight.grad = value.clone()
        for optimizer in optimizers:
            optimizer.step()
    return [weight.detach() for weight in weights]


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon is in torch from 2.9 on")


@needs_muon
def test_muon_moves_matrices_and_adamw_the_rest():
    """As two optimizers of torch by hand, also where a state was loaded on the way."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4,), (4, 6), (6, 4)]  # a bias, a matrix, and an embedding, which is no matrix

    def draw():
        return [torch.randn(shape, generator=generator) for shape in shapes]

    values, gradients = draw(), [draw() for _ in range(4)]
    config = TrainingConfig(optimizer="Muon", lr=0.1, schedule="constant", weight_decay=0.1, max_grad_norm=1e9)

    def make(values):
        weights = [torch.nn.Parameter(value.clone()) for value in values]
        return weights, StageOptimizer(weights, config, matrices={weights[1]}, lr_scales={weights[2]: 0.5})

    weights, first = make(values)
    steps_of(weights, gradients[:2], [first])
    again, second = make(values)
    second.load_state_dict(first.state_dict())
    moved = steps_of(again, gradients[2:], [second])

    bias, matrix, embedding = (torch.nn.Parameter(value.clone()) for value in values)
    by_hand = [
        torch.optim.Muon([matrix], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([bias], lr=0.1, weight_decay=0.0),
        torch.optim.AdamW([embedding], lr=0.05, weight_decay=0.1),
    ]
    expected = steps_of([bias, matrix, embedding], gradients, by_hand)
    assert all(map(torch.equal, moved, expected))


@needs_muon
@pytest.mark.parametrize("stage", ["one", "two"])
def test_muon_serves_both_stages_and_resumes(stage, tmp_path):
    def run(folder, **arguments):
        settings = {"steps": 4, "save_every": 2, "output_dir": folder, "warmup": 0, "optimizer": "Muon", **arguments}
        if stage == "one":
            model, graft, _ = run_distill({"self_attention[1]": RANDOM}, **settings)
            return graft.tensors(model)
        model = grafted_model(rules={"self_attention[1]": RANDOM})
        run_finetune(model, **settings)
        return model.state_dict()

    expected = {name: tensor.clone() for name, tensor in run(tmp_path / "through").items()}
    with pytest.raises(StopError):
        run(tmp_path / "cut", callbacks=[StopAt(3)])
    assert same(run(tmp_path / "cut", resume=True), expected)


def test_an_older_torch_says_that_it_has_no_muon(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(TrainingError, match="from 2.9 on"):
        run_finetune(grafted_model(), optimizer="Muon")


def test_rates_differ_by_rule_key_and_for_the_rest():
    """Steps of plain descent are as long as the gradient times the factor."""
    moved = []
    for lr_scale in ({}, {"rest": 0.0, "self_attention[:]": 2.0, "self_attention[1]": 0.5}):
        model = grafted_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        settings = {"optimizer": "SGD", "lr": 0.1, "schedule": "constant", "steps": 1, "max_grad_norm": 1e9}
        run_finetune(model, lr_scale=lr_scale, **settings)
        moved.append({name: tensor - before[name] for name, tensor in model.state_dict().items()})
    for name, change in moved[1].items():
        factor = 0.0
        if ".attn1." in name:
            factor = 0.5 if name.startswith("transformer_blocks.1.") else 2.0
        torch.testing.assert_close(change, factor * moved[0][name], rtol=1e-4, atol=1e-6)
    with pytest.raises(RuleError):
        run_finetune(grafted_model(), lr_scale={"self_attention[9]": 1.0})
