"""Output layers solved by ridge regression on what the intact model gives."""

import pytest
import torch
from torch import nn

import diffusers_graft as dg
from diffusers_graft.errors import OperatorError, StateError, TrainingError
from diffusers_graft.training.distill.ridge import _Regression
from diffusers_graft.training.noised_batch import Noising

from ...models import SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart

NARROW = {"operator": "mlp", "expansion": 1}


def quick(steps=4, **settings):
    return dg.ClosedFormConfig(steps=steps, progress=False, **settings)


def grafted(rules, model=None):
    model = model or tiny_dit()
    return model, dg.build_graft(model, dg.plan_graft(model, rules))


def solve(rules, model=None, data=None, **settings):
    model, graft = grafted(rules, model)
    return model, graft, dg.closed_form(model, graft, data or batches(), quick(**settings), noise_scheduler=SCHEDULER)


def seen_by(model, path, data, seed=0, steps=4):
    """What enters and leaves a part over the batches of a run."""
    rows, generator = [], torch.Generator().manual_seed(seed)
    hook = lambda module, args, output: rows.append((args[0], output))  # noqa: E731
    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        for batch, _ in zip(data, range(steps), strict=False):
            model(**Noising(scheduler=SCHEDULER)(model, batch, generator).inputs)
    handle.remove()
    inputs, outputs = zip(*rows, strict=True)
    return torch.cat(inputs).flatten(0, 1), torch.cat(outputs).flatten(0, 1)


def held_out_error(model, graft, path):
    inputs, outputs = seen_by(model, path, batches(6, seed=5), seed=7, steps=6)
    with torch.no_grad():
        answers = graft.seats[path](inputs[None])[0]
    return ((answers - outputs).norm() / outputs.norm()).item()


def make_linear(model):
    """Feed-forwards that are linear, since their neurons are far where the activation is the identity."""
    for site in dg.find_sites(model).where(kind="feed_forward"):
        layer = model.get_submodule(site.path)
        with torch.no_grad():
            layer.net[0].proj.bias.fill_(500.0)
    return model


def test_a_linear_original_is_found_again():
    model = make_linear(tiny_dit().double())
    model, graft, reports = solve(
        {"feed_forward[:]": {"operator": "linear_mlp", "init": "random"}}, model, ridge=1e-12
    )
    assert len(reports) == 4
    for edit in graft.plan.edits:
        original, linear = model.get_submodule(edit.site.path), graft.seats[edit.site.path].graft.linear
        weight = original.net[2].weight @ original.net[0].proj.weight
        torch.testing.assert_close(linear.weight, weight, rtol=1e-5, atol=1e-6)
    assert all(report.first_error > 0.5 and report.relative_error < 1e-6 for report in reports.values())


@pytest.mark.parametrize("spec", ["linear_mlp", NARROW, {"operator": "hyena_mlp", "positions": 16}], ids=str)
def test_the_solution_is_least_squares_on_all_rows(spec):
    model = tiny_dit().double()
    model, graft, reports = solve({"feed_forward[1]": spec}, model, ridge=1e-14, energy=False)
    (path,), (report,) = graft.seats, reports.values()
    operator = graft.seats[path].graft
    layer = operator.get_submodule(operator.output_layer)
    inputs, outputs = seen_by(model, path, batches())
    inputs_of_layer = []
    handle = layer.register_forward_hook(lambda module, args, output: inputs_of_layer.append(args[0]))
    with torch.no_grad():
        answers = graft.seats[path](inputs.unflatten(0, (-1, 16))).flatten(0, 1)
    handle.remove()
    rows = torch.cat([inputs_of_layer[0].flatten(0, 1), torch.ones(len(inputs), 1)], dim=1)
    assert report.tokens == len(rows) == 4 * 8 * 16
    best = torch.linalg.lstsq(rows, outputs).solution
    torch.testing.assert_close(answers, rows @ best, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.cat([layer.weight, layer.bias[:, None]], 1).T, best, rtol=1e-3, atol=1e-5)
    assert report.relative_error == pytest.approx(((rows @ best - outputs).norm() / outputs.norm()).item(), rel=1e-6)
    assert report.last_loss == pytest.approx((rows @ best - outputs).square().mean().item(), rel=1e-6)


def regression(features=6, width=3, bias=True):
    site = dg.Site(kind="feed_forward", index=0, path="x", width=width, hidden=4 * width, activation="gelu")
    return _Regression(site, nn.Identity(), nn.Linear(features, width, bias=bias).double())


@pytest.mark.parametrize("bias", [True, False])
def test_the_ridge_pulls_towards_the_present_weights(bias):
    """By the stacked system [X; sqrt(pull) I] S = [R; 0]; fewer rows than features are enough."""
    system, rows, target = regression(bias=bias), torch.randn(4, 6).double(), torch.randn(4, 3).double()
    layer = system.layer
    with torch.no_grad():
        before = layer.weight.clone()
        missed = target - layer(rows)
        system._add(rows, missed, target)
        report = system.solve(ridge=0.1)
        system.apply()
        wide = torch.cat([rows, torch.ones(4, 1)], 1) if bias else rows
        pull = 0.1 * wide.square().sum() / wide.shape[1]
        stacked = torch.cat([wide, pull.sqrt() * torch.eye(wide.shape[1])])
        step = torch.linalg.lstsq(stacked, torch.cat([missed, torch.zeros(wide.shape[1], 3)])).solution
        torch.testing.assert_close(layer.weight - before, step[:6].T)
        torch.testing.assert_close(target - layer(rows), missed - wide @ step)
    assert report.relative_error == pytest.approx(((missed - wide @ step).norm() / target.norm()).item())
    assert report.first_error == pytest.approx((missed.norm() / target.norm()).item())


def test_a_large_ridge_changes_nothing():
    _, graft = grafted({"feed_forward[0]": NARROW})
    start = graft.seats["transformer_blocks.0.ff"].graft.down.weight.clone()
    _, graft, _ = solve({"feed_forward[0]": NARROW}, ridge=1e12, energy=False)
    torch.testing.assert_close(graft.seats["transformer_blocks.0.ff"].graft.down.weight, start)


def test_memory_does_not_grow_with_batches(monkeypatch):
    kept = []

    def measure(self, ridge):
        tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        kept.append((self.gram.shape, self.cross.shape, sum(t.numel() for t in tensors), self._captured))
        return solved(self, ridge)

    solved = _Regression.solve
    monkeypatch.setattr(_Regression, "solve", measure)
    for steps in (1, 9):
        solve({"feed_forward[0]": NARROW}, steps=steps)
    assert kept[0] == kept[1]
    assert kept[0] == ((17, 17), (17, 16), 17 * 17 + 17 * 16 + 2, None)


def test_the_model_is_untouched():
    model, graft = grafted({"feed_forward[:]": NARROW, "self_attention[1::2]": "hyena_x"})
    model.train()
    before, tensors, state = predict(model.eval()), tensors_of(model.train()), torch.get_rng_state()
    dg.closed_form(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)
    assert same_tensors(model, tensors)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for seat in graft.seats.values() for module in seat.modules())
    assert torch.equal(predict(model.eval()), before)
    model.set_graft(graft)
    grown = predict(model)
    model.unset_graft()
    assert torch.equal(predict(model), before)
    assert not torch.equal(grown, before)


def test_active_neurons_and_refitting_beat_large_weights():
    """A narrower feed-forward, on batches that were not solved for."""
    plain, kept, solved = [], [], []
    for index in range(4):
        rule, path = {f"feed_forward[{index}]": NARROW}, f"transformer_blocks.{index}.ff"
        model, graft = grafted(rule, silent_model())
        plain.append(held_out_error(model, graft, path))
        for energy, errors in ((False, kept), (True, solved)):
            model, graft, _ = solve(rule, silent_model(), data=batches(8), steps=8, energy=energy)
            errors.append(held_out_error(model, graft, path))
    assert all(a < b for a, b in zip(kept, plain, strict=True))
    assert all(a < b for a, b in zip(solved, kept, strict=True))


def silent_model():
    """Every other hidden neuron has larger weights, and never fires."""
    model = tiny_dit()
    with torch.no_grad():
        for site in dg.find_sites(model).where(kind="feed_forward"):
            part = model.get_submodule(site.path)
            part.net[0].proj.weight[::2] *= 2
            part.net[0].proj.bias[::2] = -60
    return model


def test_the_energies_are_mean_squares_of_hidden_neurons(monkeypatch):
    given = []
    operator = dg.operators.get("mlp")
    start = operator.init_from
    monkeypatch.setattr(operator, "init_from", lambda self, pair: (given.append(pair.energy), start(self, pair))[1])
    model, graft, _ = solve({"feed_forward[2]": NARROW, "feed_forward[1]": {"operator": "mlp", "expansion": 5}})
    inputs, _ = seen_by(model, "transformer_blocks.2.ff.net.2", batches())
    assert [energy is None for energy in given] == [True, True, False]  # built twice; only the narrow one starts anew
    torch.testing.assert_close(given[-1], inputs.double().square().mean(0))


def test_the_means_of_hidden_neurons_are_measured_with_them(monkeypatch):
    given = []
    operator = dg.operators.get("mlp")
    start = operator.init_from
    monkeypatch.setattr(operator, "init_from", lambda self, pair: (given.append(pair.mean), start(self, pair))[1])
    model, _, _ = solve({"feed_forward[2]": NARROW})
    inputs, _ = seen_by(model, "transformer_blocks.2.ff.net.2", batches())
    torch.testing.assert_close(given[-1], inputs.double().mean(0))


@pytest.mark.parametrize("trained", [{"operator": "mlp", "expansion": 1, "init": "random"}, NARROW], ids=str)
def test_parts_that_start_at_random_or_were_trained_are_not_started_anew(trained):
    model, graft = grafted({"feed_forward[0]": trained})
    if trained is NARROW:
        dg.distill(model, graft, batches(), dg.DistillConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    up = graft.seats["transformer_blocks.0.ff"].graft.up.weight.clone()
    dg.closed_form(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)
    assert torch.equal(graft.seats["transformer_blocks.0.ff"].graft.up.weight, up)


def test_a_solved_linear_map_beats_its_start():
    for index in range(4):
        path = f"transformer_blocks.{index}.ff"
        model, graft = grafted({f"feed_forward[{index}]": "linear_mlp"})
        start = held_out_error(model, graft, path)
        dg.closed_form(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)
        assert held_out_error(model, graft, path) < start


@pytest.mark.parametrize("spec", ["hyena_x", "linear_attention", "neighborhood"])
@pytest.mark.parametrize("family", [tiny_dit, tiny_pixart])
def test_a_mixers_output_projection(spec, family):
    model = family()
    data = batches(channels=4) if family is tiny_pixart else batches()
    if family is tiny_pixart:
        from diffusers_graft.inspection import example_inputs

        conditions = example_inputs(model, batch_size=8)
        data = [
            {"sample": conditions.pop("hidden_states"), **{k: v for k, v in conditions.items() if k != "timestep"}}
        ]
    tensors = tensors_of(model)
    model, graft, reports = solve({"self_attention[:]": spec}, model, data)
    assert same_tensors(model, tensors)
    for edit in graft.plan.edits:
        assert reports[edit.site.address].relative_error < reports[edit.site.address].first_error
        names = set(graft.tensors_of(edit.site.path))
        assert {"to_out.0.weight", "to_out.0.bias"} <= names
        assert "to_q.weight" not in names  # still the original's own


def test_the_report_is_what_the_installed_part_leaves():
    model, graft, reports = solve({"self_attention[1]": "hyena_x"}, tiny_dit().double())
    path, report = "transformer_blocks.1.attn1", reports["self_attention[1]"]
    inputs, outputs = seen_by(model, path, batches())
    with torch.no_grad():
        answers = graft.seats[path](inputs.unflatten(0, (-1, 16))).flatten(0, 1)
    assert report.relative_error == pytest.approx(((answers - outputs).norm() / outputs.norm()).item(), rel=1e-6)


def test_parts_without_an_output_layer_are_left_alone():
    model, graft, reports = solve({"feed_forward[0]": "moe_mlp", "feed_forward[1]": "linear_mlp"})
    assert list(reports) == ["feed_forward[1]"]
    model, graft = grafted({"feed_forward[0]": "moe_mlp"})
    with pytest.raises(OperatorError, match="nothing to solve for"):
        dg.closed_form(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)


def test_an_attention_that_scales_its_output_is_refused():
    model = tiny_dit()
    model.transformer_blocks[0].attn1.rescale_output_factor = 2.0
    model, graft = grafted({"self_attention[0]": "hyena_x"}, model)
    with pytest.raises(OperatorError, match="does more to the output of its last linear layer"):
        dg.closed_form(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("spec", [NARROW, "linear_mlp"], ids=str)
def test_values_that_are_not_finite_are_refused(spec):
    model, graft = grafted({"feed_forward[2]": spec})
    bad = batches()
    bad[1]["sample"][0] = float("nan")
    before = {name: tensor.clone() for name, tensor in graft.tensors(model).items()}
    with pytest.raises(TrainingError, match=r"feed_forward\[2\] are not finite"):
        dg.closed_form(model, graft, bad, quick(), noise_scheduler=SCHEDULER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in graft.tensors(model).items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert graft.history == []


def test_an_original_that_overflows_is_named():
    model, graft = grafted({"feed_forward[2]": {"operator": "linear_mlp", "init": "random"}})
    model.transformer_blocks[2].ff.net[2].bias.data[0] = float("inf")
    with pytest.raises(TrainingError, match=r"feed_forward\[2\] are not finite"):
        dg.closed_form(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)


def test_it_needs_the_intact_model_and_enough_batches():
    model, graft = grafted({"feed_forward[0]": "linear_mlp"})
    with pytest.raises(TrainingError, match="ran out"):
        dg.closed_form(model, graft, iter(batches(2)), quick(4), noise_scheduler=SCHEDULER)
    model.set_graft(graft)
    with pytest.raises(StateError, match="watches the original parts"):
        dg.closed_form(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)
    model.disable_graft()
    dg.closed_form(model, graft, batches(), quick(), noise_scheduler=SCHEDULER)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"ridge": 0.0}, {"ridge": float("nan")}, {"ridge": float("inf")}])
def test_bad_settings(settings):
    with pytest.raises(TrainingError, match="positive ridge"):
        dg.ClosedFormConfig(**settings)


def test_a_ridge_too_small_for_its_rows_is_an_error():
    system, row = regression(), torch.ones(1, 6).double() / 3
    with torch.no_grad():
        system._add(row, torch.ones(1, 3).double(), torch.ones(1, 3).double())
        with pytest.raises(TrainingError, match="too much alike for a ridge of 1e-25.*larger ridge"):
            system.solve(ridge=1e-25)


def test_a_half_precision_model_is_solved_in_double():
    model, graft, reports = solve({"feed_forward[:]": "linear_mlp"}, tiny_dit().bfloat16())
    assert all(report.relative_error < report.first_error for report in reports.values())
    assert graft.seats["transformer_blocks.0.ff"].graft.linear.weight.dtype == torch.bfloat16


def test_it_is_on_the_card_and_comes_back(tmp_path):
    model, graft, reports = solve({"feed_forward[1]": "linear_mlp"})
    dg.distill(model, graft, batches(), dg.DistillConfig(steps=2, progress=False), noise_scheduler=SCHEDULER)
    assert [row["stage"] for row in graft.history] == ["closed form", "one"]
    model.set_graft(graft)
    expected = predict(model)
    model.save_graft(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| closed form | 4 | none | output layers, solved |" in card
    assert "| closed form | `feed_forward[1]` |" in card
    assert f"{reports['feed_forward[1]'].relative_error:.1%}" in card
    assert "on the batches of its training" in card
    fresh = tiny_dit()
    fresh.load_graft(tmp_path)
    assert torch.equal(predict(fresh), expected)
    assert fresh.graft.history == graft.history


def test_where_one_part_cannot_be_solved_for_none_is_changed(monkeypatch):
    model, solve = tiny_dit(), _Regression.solve

    def fails(self, ridge):
        if self.site.index == 2:
            raise TrainingError("too much alike")
        return solve(self, ridge)

    graft = dg.build_graft(model, dg.plan_graft(model, {"feed_forward[1:3]": "mlp"}))
    before = {name: tensor.clone() for name, tensor in graft.tensors(model).items()}
    monkeypatch.setattr(_Regression, "solve", fails)
    with pytest.raises(TrainingError, match="too much alike"):
        dg.closed_form(model, graft, batches(), dg.ClosedFormConfig(steps=1, energy=False), noise_scheduler=SCHEDULER)
    assert all(torch.equal(tensor, before[name]) for name, tensor in graft.tensors(model).items())


def test_only_the_model_that_a_graft_was_built_beside_is_accepted():
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, {"feed_forward[1]": "mlp"}))
    with pytest.raises(StateError, match="built beside another model"):
        dg.closed_form(tiny_dit(), graft, batches(), noise_scheduler=SCHEDULER)
