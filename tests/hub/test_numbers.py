"""The numbers that the formats promise."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

import diffusers_graft as dg
from diffusers_graft.bench.loading import measure
from diffusers_graft.operators import Mixer
from diffusers_graft.operators.base import BlockOperator

from ..models import tiny_dit
from .matrix import DTYPES, cases, save

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operator_reloads_bit_equal_in_a_new_process(dtype, tmp_path):
    """Operator x kind x (graft alone, whole model, pipeline)."""
    expected = {}
    for name, kind in cases():
        expected[f"{name} {kind}"] = save(tmp_path / f"{name} {kind}", name, kind, dtype)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-m", "tests.hub.matrix", str(tmp_path), dtype], env=environment, cwd=ROOT, capture_output=True, check=False)
    assert not result.returncode, result.stderr.decode()[-2000:]
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert seen.keys() == expected.keys()
    wrong = [f"{case} {form}" for case, forms in expected.items() for form, output in forms.items() if not torch.equal(seen[case][form], output)]
    assert not wrong
    # What stands for blocks makes its rounds in tests/blocks.
    assert {case.split()[0] for case in expected} == {
        name for name in dg.operators.available() if not issubclass(dg.operators.get(name), BlockOperator)
    }


def mixers():
    return [name for name in dg.operators.available() if issubclass(dg.operators.get(name), Mixer) and "self_attention" in dg.operators.get(name).kinds]


@pytest.mark.parametrize("name", mixers())
def test_a_mixer_on_dit_xl_is_less_than_one_percent(name):
    """All 28 layers; shapes alone, without memory for the values."""
    with torch.device("meta"):
        model = DiTTransformer2DModel()
    model = model.to("meta")
    base = sum(tensor.numel() for tensor in model.state_dict().values())
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[:]": name}))
    own = sum(tensor.numel() for path in graft.seats for tensor in graft.own_tensors_of(path).values())
    assert base > 675_000_000
    assert own < 0.01 * base


def test_the_benchmark_of_loading_runs(tmp_path):
    """Its ratio is judged by `make bench-loading`, on a size that means something."""
    from diffusers_graft.bench import loading

    model = tiny_dit()
    model.set_graft(loading.RULES)
    model.save_graft(tmp_path)
    model.unset_graft()
    seconds = measure(tmp_path, model, rounds=1)
    assert set(seconds) == {"read", "install", "load", "compare", "replay", "verified", "ratio", "verified_ratio"}
    assert model.graft is None
