"""The zoo, as the tests use it."""

import torch

from tests.tiny_models import ONE_AT_A_TIME, ROWS, Draw, exported, inputs_of, tiny

__all__ = ["ONE_AT_A_TIME", "ROWS", "Draw", "exported", "first", "inputs_of", "predict", "tiny"]


def first(output):
    """The first tensor of whatever a model gives."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


@torch.no_grad()
def predict(model, name, **sizes):
    return first(model(**inputs_of(name, **sizes)))
