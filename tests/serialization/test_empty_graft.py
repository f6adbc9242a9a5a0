"""Parts built for loading; a device or dtype that a model cannot have is refused before anything moves."""

import pytest
import torch

from diffusers_graft.errors import StateError
from diffusers_graft.serialization.empty_graft import require_device

from ..models import tiny_dit
from .forging import saved, untouched


@pytest.mark.parametrize("device", ["nope", "cuda:999", 5.5, "meta", torch.device("meta"), ["cpu"]], ids=str)
def test_a_device_that_holds_no_values_is_refused_and_the_model_stays(device, tmp_path):
    saved(tmp_path)
    model = tiny_dit()

    def refused():
        with pytest.raises(StateError, match="A model cannot be loaded onto"):
            model.load_graft(tmp_path, device=device)

    untouched(model, refused)


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")], ids=str)
def test_a_device_that_is_there_is_taken(device):
    require_device(device)
