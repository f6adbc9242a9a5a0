"""Hostile files: each is refused in words, in time and within the budget of its size, or loads and is what was saved."""

import random
import shutil

import pytest
import torch

import diffusers_graft as dg
from benchmarks import fuzz
from benchmarks.hostile_files import BYTES, INDEX
from diffusers_graft.errors import GraftError

from ..models import predict, tiny_dit
from .forging import CONFIG, PROOF, RULES, WEIGHTS

GRAFT = [WEIGHTS, CONFIG, PROOF]
WHOLE = ["SHARD", "config.json", INDEX]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    model = tiny_dit(num_layers=2)
    model.set_graft({**RULES, "feed_forward[0]": {"operator": "mlp", "expansion": 2}})
    model.save_graft(folder / "graft")
    model.save_pretrained(folder / "whole", max_shard_size="25KB")
    return folder, predict(model)


def mutate(folder, names, chance):
    name = chance.choice(names)
    path = folder / name if name != "SHARD" else sorted(folder.glob("*00001-of*"))[0]
    path.write_bytes(chance.choice(BYTES)(path.read_bytes(), chance))
    if name == WEIGHTS and chance.random() < 0.7:  # so that the copy in the header stands alone
        (folder / CONFIG).unlink()
    if name != PROOF:
        (folder / PROOF).unlink(missing_ok=True)
    return name


@pytest.mark.parametrize("start", range(0, 400, 100))
def test_mutated_grafts(start, sound, tmp_path):
    """One model for all: a refusal must leave it as it was."""
    source, expected = sound
    model = tiny_dit(num_layers=2)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    loads = 0
    for seed in range(start, start + 100):
        folder = shutil.copytree(source / "graft", tmp_path / "graft")
        name = mutate(folder, GRAFT, random.Random(seed))
        try:
            model.load_graft(folder)
        except GraftError:
            assert model.graft is None
        else:
            loads += 1
            if name != PROOF:
                assert torch.equal(predict(model), expected), f"seed {seed} loaded as something else"
            model.unset_graft()
        assert dict(model.named_modules()) == modules, seed
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items()), seed
        shutil.rmtree(folder)
    assert loads < 60


def test_mutated_whole_models(sound, tmp_path):
    source, expected = sound
    for seed in range(100):
        folder = shutil.copytree(source / "whole", tmp_path / "whole")
        mutate(folder, WHOLE, random.Random(seed))
        try:
            model = dg.load_pretrained(folder)
        except GraftError:
            pass
        else:
            assert torch.equal(predict(model), expected), f"seed {seed} loaded as something else"
        shutil.rmtree(folder)


def require_sound(loads):
    """That every load ended in words, within its memory; how long each took is for the benchmark to say."""
    assert [load for load in loads if load.outcome not in ("loaded", "refused")] == []
    assert [load for load in loads if load.growth > load.allowed] == []


def test_hostile_files_of_every_kind():
    """Each is loaded in a process of its own, since what it asks for may never end."""
    require_sound(fuzz.run(24, seed=7, operators=["ttt", "moe_mlp"]))


@pytest.mark.long
def test_a_thousand_hostile_files():
    require_sound(fuzz.run(1000, seed=11))


def test_the_report_names_broken_promises():
    loads = [
        fuzz.Load(0, "grow_json", "refused", 0.1, 10, 100),
        fuzz.Load(1, "change_setting", "KeyError: 'x'", 0.1, 10, 100),
        fuzz.Load(2, "change_setting", "loaded", 7.0, 10, 100),
        fuzz.Load(3, "lengthen_plan", "loaded", 0.1, 200 * 2**20, 100 * 2**20),
        fuzz.Load(4, "replace_by_special", "hangs", 40.0, 0, 100),
    ]
    text = fuzz.report(loads)
    assert "2 hangs over 5 s" in text
    assert "1 grew beyond" in text
    assert "1 raw errors" in text
    assert [load.fault for load in loads] == [None, "KeyError: 'x'", "7.0 s", "200 MiB of 100", "hangs"]
