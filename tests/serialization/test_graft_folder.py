"""Saved and loaded, whole or refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig

import diffusers_graft as dg
from diffusers_graft.errors import FileError, MismatchError, StateError
from diffusers_graft.serialization.graft_folder import fill

from ..models import FAMILIES, SCHEDULER, batches, predict, same_tensors, tensors_of, tiny_dit, tiny_pixart
from .forging import RULES, saved, untouched

NEW_PROCESS = """
import sys, torch
from pathlib import Path
from tests.models import FAMILIES, predict
import diffusers_graft
seen = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = FAMILIES[folder.name.split()[0]](num_layers=6)
    model.load_graft(folder)
    seen[folder.name] = predict(model)
torch.save(seen, sys.argv[2])
"""

STAGE_TWO = {
    "all": {"train": "all"},
    "lora": {"train": "operators", "lora": LoraConfig(r=2, target_modules=["to_q", "proj"])},
}


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """Grafts by name: their folder, their outputs, and those that a new process got from it."""
    root, expected = tmp_path_factory.mktemp("elsewhere"), {}
    (root / "grafts").mkdir()
    for family, make in FAMILIES.items():
        names = ("sliding_window", "neighborhood", "hyena_x", "linear_attention")
        rules = {f"self_attention[{n}]": name for n, name in enumerate(names)}
        rules |= {
            "self_attention[4]": {"operator": "self_attention", "init": "random"},
            "feed_forward[1::2]": {"operator": "mlp", "expansion": 3},
        }
        expected[f"{family} operators"] = saved(root / "grafts" / f"{family} operators", make(num_layers=6), rules)
    for name, settings in STAGE_TWO.items():
        model = tiny_dit(num_layers=6)
        model.set_graft({"self_attention[1::2]": "neighborhood"})
        dg.finetune(
            model,
            batches(),
            dg.FinetuneConfig(steps=3, lr=1e-2, progress=False, **settings),
            noise_scheduler=SCHEDULER,
        )
        model.save_graft(root / "grafts" / f"dit {name}")
        expected[f"dit {name}"] = predict(model)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", NEW_PROCESS, str(root / "grafts"), str(root / "seen.pt")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    seen = torch.load(root / "seen.pt", weights_only=True)
    return {name: (root / "grafts" / name, output, seen[name]) for name, output in expected.items()}


@pytest.mark.parametrize(
    "name", [*(f"{family} operators" for family in FAMILIES), *(f"dit {name}" for name in STAGE_TWO)]
)
def test_a_new_process_loads_it_bit_for_bit(name, loaded_elsewhere):
    """Operators one after the other over the sites of one model; weights that stage two trained."""
    _, expected, seen = loaded_elsewhere[name]
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("name", STAGE_TWO)
def test_what_stage_two_trained_comes_back_too(name, loaded_elsewhere, tmp_path):
    folder, expected, _ = loaded_elsewhere[f"dit {name}"]
    fresh = tiny_dit(num_layers=6)
    before = tensors_of(fresh)
    fresh.load_graft(folder)
    fresh.save_graft(tmp_path / "again")
    fresh.unset_graft()
    assert same_tensors(fresh, before)
    again = tiny_dit(num_layers=6)
    again.load_graft(tmp_path / "again")
    assert torch.equal(predict(again), expected)


def test_the_folder_and_its_card(tmp_path):
    saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "graft_config.json",
        "graft_model.safetensors",
        "graft_proof.safetensors",
        "README.md",
    }
    card = (tmp_path / "README.md").read_text()
    for words in (
        "hyena_x(kernel_size=4",
        "`feed_forward[0]`",
        "library_name: diffusers-graft",
        "self_attention   ·█·█",
        "2506.05340",
    ):
        assert words in card
    assert "Evaluation" not in card  # nothing was measured


def test_saving_over_another_graft_replaces_it_whole(tmp_path):
    saved(tmp_path)
    expected = saved(tmp_path, rules={"self_attention[0]": "neighborhood"})
    model = tiny_dit()
    model.load_graft(tmp_path)
    assert torch.equal(predict(model), expected)


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    model = tiny_dit()
    model.set_graft(RULES)
    for save in (model.save_graft, model.save_pretrained):
        with pytest.raises(FileError, match="is a file"):
            save(tmp_path / "file")


@pytest.mark.parametrize(
    "other", [tiny_pixart, lambda: tiny_dit(num_layers=2), lambda: tiny_dit(attention_head_dim=4)]
)
def test_a_graft_for_another_model_is_refused(other, tmp_path):
    saved(tmp_path)
    model = other()
    with pytest.raises(MismatchError):
        model.load_graft(tmp_path)
    assert model.graft is None


def test_other_weights_are_refused_unless_allowed(tmp_path):
    saved(tmp_path)
    model = tiny_dit()
    with torch.no_grad():
        model.proj_out_1.weight[0, 0] += 1
    with pytest.raises(MismatchError, match="allow_base_mismatch=True"):
        model.load_graft(tmp_path)
    model.load_graft(tmp_path, allow_base_mismatch=True)
    assert model.graft is not None


def test_a_tensor_of_no_part_is_refused(tmp_path):
    model = tiny_dit()
    graft = dg.build_graft(model, dg.plan_graft(model, RULES))
    with pytest.raises(FileError, match="it holds nothing.weight, which this model does not have"):
        fill(model, graft, {"nothing.weight": torch.ones(1)}, tmp_path)


def test_which_parts_of_another_base_differ_is_told(tmp_path):
    saved(tmp_path)
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[0].ff.net[0].proj.weight[0, 0] += 1
        model.transformer_blocks[1].attn1.to_q.weight[0, 0] += 1
    with pytest.raises(MismatchError, match="among them those of 2 parts that it replaces"):
        model.load_graft(tmp_path)


def test_a_bfloat16_base_is_still_the_same_base(tmp_path):
    saved(tmp_path)
    model = tiny_dit().to(torch.bfloat16)
    model.load_graft(tmp_path)
    assert predict(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("made", "loaded"),
    [(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float16, torch.float16)],
)
def test_a_float16_base_is_still_the_same_base(made, loaded, tmp_path):
    """Values that float16 rounds to the middle of two of bfloat16 go the other way from there."""

    def base(dtype):
        model = tiny_dit()
        with torch.no_grad():
            model.proj_out_1.weight.fill_(1 + 2**-8 + 2**-12)
        return model.to(dtype)

    saved(tmp_path, base(made))
    base(loaded).load_graft(tmp_path)
    other = base(loaded)
    with torch.no_grad():
        other.proj_out_1.weight[0, 0] += 1
    with pytest.raises(MismatchError):
        other.load_graft(tmp_path)


def test_loading_onto_a_grafted_model_is_refused(tmp_path):
    saved(tmp_path)
    model = tiny_dit()
    model.set_graft({"self_attention[1]": "neighborhood"})
    grafted = predict(model)
    with pytest.raises(StateError):
        model.load_graft(tmp_path)
    assert torch.equal(predict(model), grafted)


def test_a_disabled_graft_is_not_saved_by_mistake(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.disable_graft()
    with pytest.raises(StateError, match="enable_graft"):
        model.save_graft(tmp_path)


def test_no_path_of_this_machine_is_saved(tmp_path):
    base = tmp_path / "base"
    tiny_dit().save_pretrained(base)
    model = DiTTransformer2DModel.from_pretrained(base)
    saved(tmp_path / "graft", model)
    for path in (tmp_path / "graft").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_load_that_fails_after_the_model_was_moved_puts_its_tensors_back(tmp_path, monkeypatch):
    saved(tmp_path)
    model = tiny_dit()
    parameters = dict(model.named_parameters())

    def move_and_fail(self, *args, **where):
        # As moving to some devices does, it gives every module parameters of its own.
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.zeros_like(parameter))
        raise RuntimeError("no room there")

    monkeypatch.setattr(type(model), "to", move_and_fail)

    def refused():
        with pytest.raises(RuntimeError, match="no room there"):
            model.load_graft(tmp_path, dtype=torch.bfloat16)

    untouched(model, refused)
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())


def test_values_that_a_cast_makes_infinite_are_refused(tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    with torch.no_grad():
        next(model.graft.operators()["transformer_blocks.0.ff"].parameters()).view(-1)[0] = 1e5
    model.save_graft(tmp_path)
    half = tiny_dit().half()

    def refused():
        with pytest.raises(FileError, match="not finite"):
            half.load_graft(tmp_path, verify=False, allow_base_mismatch=True)

    refused()
    assert half.graft is None
    tiny_dit().load_graft(tmp_path)


@pytest.mark.parametrize("subfolder", [None, ""])
def test_no_subfolder_is_the_folder_itself(subfolder, tmp_path):
    expected = saved(tmp_path)
    model = tiny_dit()
    model.load_graft(tmp_path, subfolder=subfolder)
    assert torch.equal(predict(model), expected)


@pytest.mark.parametrize("subfolder", [5, "../x", "/etc"])
def test_a_subfolder_that_is_none_is_refused(subfolder, tmp_path):
    with pytest.raises(FileError, match="subfolder"):
        tiny_dit().load_graft(tmp_path, subfolder=subfolder)
