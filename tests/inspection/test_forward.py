"""Forwards that leave no trace."""

import pytest
import torch
from torch import nn

from diffusers_graft.inspection import evaluating, predict


class Answers(nn.Module):
    """A model that returns what it is told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, hidden_states, return_dict=True):
        assert return_dict is False
        return self.answer


def test_every_module_gets_its_mode_back_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with pytest.raises(ZeroDivisionError):
        run_in(model)
    assert [module.training for module in model.modules()] == [True, True, False, False]


def run_in(model):
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        1 / 0  # noqa: B018


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ONE, ONE),
        ((ONE, "more"), ONE),
        (([ONE, 2 * ONE],), torch.stack([ONE, 2 * ONE])),
        ([ONE, torch.ones(1)], ONE),
        ([(ONE,)], ONE),
    ],
    ids=["tensor", "tuple", "samples of one size", "samples of several sizes", "nested"],
)
def test_a_prediction_is_one_tensor(answer, expected):
    assert torch.equal(predict(Answers(answer), {"hidden_states": None}), expected)


def test_arguments_of_a_pipeline_may_name_return_dict_already():
    assert torch.equal(predict(Answers(ONE), {"hidden_states": None, "return_dict": True}), ONE)


def test_what_is_wrapped_around_a_model_is_called_in_its_place():
    model = Answers(ONE)
    assert torch.equal(predict(model, {"hidden_states": None}, lambda **inputs: 2 * model(**inputs)), 2 * ONE)
