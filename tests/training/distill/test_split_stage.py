"""Processes that divide the sites of stage one end where one process does."""

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.training.distributed import process_state

from ...models import SCHEDULER, batches
from ..runs import StopAt, StopError, build, poisoned
from ..test_distributed import SHARDED, fork_two

RULES = {
    "self_attention[:3]": {"operator": "hyena_x", "init": "random"},
    "feed_forward[1]": {"operator": "mlp", "init": "random"},
}


def distill(folder=None, data=None, steps=5, **arguments):
    """Weights of all parts, and the losses of all sites."""
    model, graft = build(RULES)
    config = dg.DistillConfig(
        steps=steps, lr=1e-3, warmup=0, evaluate_every=2, save_every=2, log_every=1, split_sites=True, progress=False
    )
    reports = dg.distill(
        model,
        graft,
        data or batches(),
        config,
        noise_scheduler=SCHEDULER,
        held_out=batches(1, seed=9),
        output_dir=folder,
        **arguments,
    )
    weights = {name: tensor.detach().clone() for name, tensor in graft.tensors(model).items()}
    return {**weights, "losses": torch.tensor([report.losses for report in reports.values()])}


def stopped_and_resumed(folder):
    """The same, of a run that was stopped in the middle."""
    with pytest.raises(StopError):
        distill(folder, callbacks=[StopAt(3)])
    process_state().wait_for_everyone()
    return distill(folder, resume=True)


@pytest.mark.parametrize("variables", [{}, pytest.param(SHARDED, marks=pytest.mark.long)], ids=["full", "sharded"])
def test_processes_that_divide_the_sites_end_where_one_does(variables, tmp_path):
    alone = distill(tmp_path / "alone")
    assert alone["losses"].shape == (4, 5)
    for result in fork_two(lambda: stopped_and_resumed(tmp_path / "run"), tmp_path, **variables):
        assert set(result) == set(alone)
        for name, tensor in alone.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=1e-6)
    # One process goes on with what two have begun, and reads the same losses.
    longer = distill(tmp_path / "run", steps=7, resume=True)
    torch.testing.assert_close(longer["losses"], distill(tmp_path / "alone", steps=7, resume=True)["losses"])


def complain():
    with pytest.raises(dg.GraftError, match="not finite|is nan") as caught:
        distill(data=poisoned())
    return {"words": torch.tensor([ord(letter) for letter in str(caught.value)])}


def test_a_loss_that_is_not_finite_stops_all_processes(tmp_path):
    assert all(len(result["words"]) for result in fork_two(complain, tmp_path))


def test_what_needs_all_sites_in_one_process_is_refused():
    for settings in ({"patience": 2}, {"reuse": 2}, {"mode": "sequential"}):
        with pytest.raises(dg.GraftError, match="With split_sites"):
            dg.DistillConfig(split_sites=True, **settings)
