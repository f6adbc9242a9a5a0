"""Checksums, fingerprints and finite values."""

import pytest
import torch

from diffusers_graft.errors import FileError
from diffusers_graft.serialization import tensors as files
from diffusers_graft.serialization.tensors import checksum, fingerprint, require_finite


def edit(**changes):
    """A change of a large tensor `big` or a small one `few`."""

    def apply(tensors):
        return {name: changes[name](tensor.clone()) if name in changes else tensor for name, tensor in tensors.items()}

    return apply


SEEN = {
    "another value of a small tensor": edit(few=lambda t: t.index_fill_(0, torch.tensor([3]), 9)),
    "all values by one percent": edit(big=lambda t: t * 1.01),
    "an update of rank one": edit(big=lambda t: t + 0.1 * torch.randn(300, 1) @ torch.randn(1, 300)),
    "one row in fifty": edit(big=lambda t: t.index_fill_(0, torch.arange(0, 300, 50), 0)),
    "eight bits": edit(big=lambda t: (t * 16).round() / 16),
    "transposed": edit(big=lambda t: t.T.contiguous()),
    "another shape": edit(big=lambda t: t.view(150, 600)),
    "another name": lambda tensors: {"large": tensors["big"], "few": tensors["few"]},
}

UNSEEN = {
    "rounded to bfloat16": edit(big=lambda t: t.bfloat16(), few=lambda t: t.bfloat16()),
    "a single value between the samples": edit(
        big=lambda t: t.index_put_((torch.tensor(0), torch.tensor(7)), torch.tensor(9.0))
    ),
}


@pytest.mark.parametrize("change", [*SEEN, *UNSEEN])
def test_which_changes_of_a_base_its_fingerprint_sees(change):
    generator = torch.Generator().manual_seed(0)
    tensors = {"big": torch.randn(300, 300, generator=generator), "few": torch.randn(40, generator=generator)}
    same = fingerprint({**SEEN, **UNSEEN}[change](tensors)) == fingerprint(tensors)
    assert same == (change in UNSEEN)


def test_saved_grafts_know_their_base_and_their_weights_by_the_same_numbers_forever():
    tensors = {"large": torch.arange(20_000, dtype=torch.float32), "small": torch.arange(3).half()}
    assert fingerprint(tensors) == "9f5fc2ccb31b9787b7a2105f51a3ce4faec87a05f9d8afee5178e959ac704ebb"
    assert checksum(tensors) == "64f0f0f6ffe3d0cb976f4242629d770fd832a6da59d1f95a8f3c3114193423ae"


def test_values_are_finite_though_their_sum_may_not_be():
    require_finite({"large": torch.full((4,), 3e38)}, "there")
    with pytest.raises(FileError, match="a in there holds values that are not finite"):
        require_finite({"a": torch.tensor([1.0, torch.nan])}, "there")


def test_checksums_see_every_bit_that_flips():
    tensors = {"a": torch.randn(5000), "b": torch.arange(7, dtype=torch.int8), "c": torch.randn(3, 3).bfloat16()}
    seen = {files.checksum(tensors)}
    for name, tensor in tensors.items():
        data = tensor.view(-1).view(torch.uint8)
        for place in (0, len(data) // 2, len(data) - 1):
            data[place] ^= 16
            seen.add(files.checksum(tensors))
            data[place] ^= 16
        seen.add(files.checksum({**tensors, name: tensor.view(-1).view(torch.uint8)}))
    assert len(seen) == 13
    assert files.checksum(tensors) in seen


def test_quantised_tensors_are_known_by_the_tensors_that_they_are_made_of():
    quantization = pytest.importorskip("torchao.quantization")
    layers = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        layers[seed] = torch.nn.Sequential(torch.nn.Linear(16, 16))
        quantization.quantize_(layers[seed], quantization.Int8WeightOnlyConfig())
    sums = [fingerprint(layer.state_dict()) for layer in (layers[0], layers[1], layers[0])]
    assert sums[0] == sums[2] != sums[1]
    require_finite(layers[0].state_dict(), "there")
