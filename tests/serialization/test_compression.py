"""Updates of trained weights made small: to a given error, told on the card, the same again on loading."""

import json

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import FileError, StateError
from diffusers_graft.serialization.compression import compress, restore

from ..models import SCHEDULER, batches, predict, tensors_of, tiny_dit
from .forging import CONFIG, WEIGHTS, forge


def trained():
    model = tiny_dit()
    model.set_graft({"self_attention[1::2]": "hyena_x"})
    settings = dg.FinetuneConfig(steps=3, lr=1e-2, progress=False, train="all")
    dg.finetune(model, batches(), settings, noise_scheduler=SCHEDULER)
    return model.eval()


def test_each_module_takes_the_smaller_form(tmp_path):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(64, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    full = torch.randn(64, 64, generator=generator)
    base = {name: torch.randn(64, 64, generator=generator) for name in ("low", "full", "same")} | {
        "bias": torch.zeros(64)
    }
    tensors = {
        "low": base["low"] + low,
        "full": base["full"] + full,
        "same": base["same"],
        "bias": full[0],
        "new": torch.randn(5),
    }
    stored, told = compress(tensors, base, 0.02)
    assert {name: row["method"] for name, row in told.items()} == {
        "low": "svd",
        "full": "int8",
        "same": "svd",
        "bias": "int8",
    }
    assert stored["low.left"].shape == (64, 2)
    again = restore(stored, told, base, tmp_path)
    assert again.keys() == tensors.keys()
    for name in told:
        error = (again[name] - tensors[name]).norm() / (tensors[name] - base[name]).norm().clamp_min(1e-9)
        assert error <= 0.02
        assert abs(told[name]["error"] - error) < 1e-5
    exact, told = compress(tensors, base, 1e-7)
    assert told.keys() <= {"same", "low"}
    assert torch.equal(exact["full"], tensors["full"])


@pytest.mark.parametrize("limit", [0.01, 0.2])
def test_a_compressed_graft_comes_back_as_its_proof_says(limit, tmp_path, caplog):
    model = trained()
    exact, tensors = predict(model), tensors_of(model)
    model.save_graft(tmp_path / "full")
    model.save_graft(tmp_path / "small", compress=limit)
    assert torch.equal(predict(model), exact)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("full", "small")]
    assert sizes[1] < sizes[0]
    told = json.loads((tmp_path / "small" / CONFIG).read_text())["compressed"]
    assert max(row["error"] for row in told.values()) <= limit
    assert (
        f"largest relative error of an update is {max(row['error'] for row in told.values()):.2%}"
        in (tmp_path / "small/README.md").read_text()
    )
    fresh = tiny_dit()
    with caplog.at_level("INFO"):
        fresh.load_graft(tmp_path / "small")
    assert "largest difference 0" in caplog.text
    plain = predict(tiny_dit())
    assert (predict(fresh) - exact).norm() < limit * 2 * (exact - plain).norm()
    fresh.unset_graft()
    assert torch.equal(predict(fresh), plain)


@pytest.mark.parametrize("error", [0, 1, True, "small", -0.1])
def test_an_error_that_is_none(error, tmp_path):
    with pytest.raises(StateError, match="between 0 and 1"):
        trained().save_graft(tmp_path, compress=error)


@pytest.mark.parametrize(
    "change",
    [
        lambda config, tensors: (
            tensors.pop(next(name for name in tensors if name.endswith((".right", ".scale")))) is None
        ),
        lambda config, tensors: next(iter(config["compressed"].values())).update(method="pickle"),
        lambda config, tensors: config["compressed"].update(nothing={"method": "svd"}),
        lambda config, tensors: config["compressed"].update({next(iter(config["compressed"])): 5}),
        lambda config, tensors: [
            tensors.update({name: t[:1]}) for name, t in tensors.items() if name.endswith(".steps")
        ][0],
    ],
)
def test_damaged_updates_are_refused(change, tmp_path):
    trained().save_graft(tmp_path, compress=0.01)
    forge(tmp_path, change)
    model = tiny_dit()
    with pytest.raises(FileError, match="does not fit|is damaged"):
        model.load_graft(tmp_path)
    assert model.graft is None


@pytest.mark.parametrize("form", ["int8", "svd"])
def test_an_update_that_is_not_finite_once_unpacked_is_refused(form, tmp_path):
    huge = {"int8": {"w.steps": torch.full((4, 4), 100, dtype=torch.int8), "w.scale": torch.full((4, 1), 3e37)}}
    huge["svd"] = {"w.left": torch.full((4, 1), 1e30), "w.right": torch.full((1, 4), 1e30)}
    with pytest.raises(FileError, match="w in .* not finite"):
        restore(huge[form], {"w": {"method": form}}, {"w": torch.zeros(4, 4)}, tmp_path)
