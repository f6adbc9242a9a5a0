"""The numbers that the formats promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

import diffusers_graft as dg
from benchmarks.loading import measure
from diffusers_graft.operators import Mixer

from ..models import tiny_dit
from .matrix import DTYPES, FAMILIES, base, rules, save, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """What every save must give, and what a new process saw."""
    root = tmp_path_factory.mktemp("matrix")
    expected = {
        f"{family} {dtype}": save(root / f"{family} {dtype}", family, dtype) for family in FAMILIES for dtype in DTYPES
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.serialization.matrix", str(root)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert not result.returncode, result.stderr.decode()[-2000:]
    return expected, torch.load(root / "seen.pt", weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_operator_reloads_bit_equal_in_a_new_process(family, dtype, reloaded):
    """Operator x kind x (graft alone, whole model, pipeline); what is named first is where a difference begins."""
    expected, seen = (side[f"{family} {dtype}"] for side in reloaded)
    assert expected.keys() == seen.keys()
    wrong = [
        f"{form}: {place}"
        for form, places in expected.items()
        for place, output in places.items()
        if not torch.equal(seen[form][place], output)
    ]
    assert not wrong
    final = [
        output
        for places in expected.values()
        for output in (places.get("output"), places.get("image"))
        if output is not None
    ]
    assert all(output.isfinite().all() for output in final)


def test_every_operator_on_every_kind_is_among_them():
    """A new operator joins by itself, and every kind that operators name has a model here."""
    edited = {
        (value if isinstance(value, str) else value["operator"], key.partition("[")[0])
        for family in FAMILIES
        for key, value in rules(family)[0].items()
    }
    declared = {(name, kind) for name in dg.operators.available() for kind in dg.operators.get(name).kinds}
    alone = {(name, "block") for name in serving("block") if dg.operators.get(name).runs_blocks}  # it takes two
    assert declared - alone <= edited
    for family in FAMILIES:
        assert len(dg.plan_graft(base(family), rules(family)[0]).edits) == len(rules(family)[0])


def mixers():
    return [
        name
        for name in dg.operators.available()
        if issubclass(dg.operators.get(name), Mixer) and "self_attention" in dg.operators.get(name).kinds
    ]


@pytest.mark.parametrize("name", mixers())
def test_a_mixer_on_dit_xl_is_less_than_one_percent(name):
    """All 28 layers; shapes alone, without memory for the values."""
    with torch.device("meta"):
        model = DiTTransformer2DModel()
    model = model.to("meta")
    base = sum(tensor.numel() for tensor in model.state_dict().values())
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[:]": name}))
    own = sum(tensor.numel() for path in graft.seats for tensor in graft.tensors_of(path).values())
    assert base > 675_000_000
    assert own < 0.01 * base


def test_the_benchmark_of_loading_runs(tmp_path):
    """Its ratio is judged by `make bench-loading`, on a size that means something."""
    from benchmarks import loading

    model = tiny_dit()
    model.set_graft(loading.RULES)
    model.save_graft(tmp_path)
    model.unset_graft()
    seconds = measure(tmp_path, model, rounds=1)
    assert set(seconds) == {"read", "install", "load", "compare", "replay", "verified", "ratio", "verified_ratio"}
    assert model.graft is None
