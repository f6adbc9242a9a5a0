"""Students: metrics, evaluations and the weights that are chosen."""

import pytest
import torch

import diffusers_graft as dg

from ...models import SCHEDULER, batches, predict, tiny_dit
from ..runs import HYENA, RANDOM, run_distill


def test_relative_error_and_cosine_are_those_of_the_outputs():
    """By hand, for the part as it starts: |new - old| / |old| and the angle, on the batch that it was shown."""
    from diffusers_graft.inspection import example_inputs

    model, seen = tiny_dit(), []
    inputs = example_inputs(model, batch_size=4)
    handle = model.transformer_blocks[1].attn1.register_forward_hook(
        lambda m, a, k, out: seen.append((a, k, out)), with_kwargs=True
    )
    _, graft, reports = run_distill({"self_attention[1]": RANDOM}, model, [inputs], steps=1, lr=1e-12)
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
    model, graft, reports = run_distill(
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


def test_the_start_is_the_result_where_training_makes_it_worse():
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
