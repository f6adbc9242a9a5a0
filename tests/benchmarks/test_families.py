"""Every class diffusers exports has a row, and every row runs."""

import pytest
import torch

from ..inspection.models import ROWS, exported, first, inputs_of, tiny


@pytest.mark.parametrize("name", sorted(exported()))
def test_every_exported_class_has_a_tiny_model_that_runs(name):
    assert name in ROWS, (
        f"{name} is new: give it a row in diffusers_graft/bench/zoo, a tiny configuration and its inputs"
    )
    model = tiny(name)
    with torch.no_grad():
        output = first(model(**inputs_of(name)))
        again = first(model(**inputs_of(name)))
    assert output.isfinite().all()
    assert torch.equal(output, again)
