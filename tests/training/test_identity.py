"""Identity of a run: it differs where the weights would, and nowhere else."""

import random

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.training.batches import BatchStream, ShuffledBatches
from diffusers_graft.training.identity import UNVERIFIED, describe_run, digest, find_differences, read_held_out
from diffusers_graft.training.noised_batch import Noising

from ..models import batches, tiny_dit
from .runs import build, finetune_config, grafted_model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(10**6), torch.full((10**6,), 1e-30)),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}),
        ([1, [2, 3]], [1, 2, 3]),
        ("1", 1),
    ],
)
def test_other_values_have_another_digest(one, other):
    assert digest(one) != digest(other)
    assert digest(one) == digest(one)


def identity(model=None, data=None, *, scheduler=None, held_out=None, null_prompt=None, **settings):
    model = model or grafted_model()
    graft = model.graft
    noising = Noising(scheduler=scheduler or DDPMScheduler(), null_prompt=null_prompt)
    stream = BatchStream(batches() if data is None else data)
    return describe_run("two", finetune_config(**settings), graft, model, noising, stream, held_out)


def other_model():
    model = tiny_dit()
    with torch.no_grad():
        model.proj_out_2.weight[0, 0] += 1e-4
    model.set_graft({"self_attention[1::2]": {"operator": "hyena_x", "init": "random"}})
    return model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: {"scheduler": DDPMScheduler(num_train_timesteps=500)}, "noise scheduler.num_train_timesteps"),
        (lambda: {"scheduler": FlowMatchEulerDiscreteScheduler()}, "noise scheduler.class"),
        (lambda: {"data": batches(seed=7)}, "data.content"),
        (lambda: {"data": batches(5)}, "data.batches"),
        (lambda: {"model": other_model()}, "base model"),
        (lambda: {"null_prompt": {"class_labels": torch.zeros(1)}}, "null prompt"),
        (lambda: {"seed": 3}, "config.seed"),
        (lambda: {"steps": 2}, "config.steps"),
    ],
)
def test_what_decides_the_weights_is_named_where_it_differs(change, named):
    assert named in find_differences(identity(), identity(**change()))


def test_what_decides_no_weight_makes_no_difference():
    assert find_differences(identity(), identity(save_every=3, log_every=7, keep=1, progress=True)) == {}


def test_the_base_model_is_the_same_while_all_its_weights_train():
    model = grafted_model()
    before = identity(model)
    dg.finetune(model, batches(1), finetune_config(2), noise_scheduler=DDPMScheduler())
    assert identity(model)["base model"] == before["base model"]
    plain, graft = build({"self_attention[1::2]": "hyena_x"})
    assert digest(dict(plain.state_dict())) == before["base model"]


class Samples(torch.utils.data.Dataset):
    def __init__(self, count=12, draw=lambda: 0.0):
        self.count = count
        self.draw = draw

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        sample = torch.full((1, 8, 8), float(index)) + self.draw()
        return {"sample": sample, "class_labels": torch.tensor(index % 5)}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ((Samples(), 4, 1), "data.seed"),
        ((Samples(), 3, 0), "data.batch size"),
        ((Samples(8), 4, 0), "data.samples"),
        ((Samples(draw=lambda: 1.0), 4, 0), "data.content"),
    ],
)
def test_batches_of_single_samples_are_known_by_their_settings_and_content(data, named):
    before = identity(data=ShuffledBatches(Samples(), 4, 0))
    assert named in find_differences(before, identity(data=ShuffledBatches(*data)))


@pytest.mark.parametrize("draw", [lambda: torch.rand(()).item(), random.random])
def test_a_data_set_with_random_augmentations_is_the_same_at_every_reading(draw):
    model = grafted_model()
    state = torch.get_rng_state()
    one, other = (identity(model, ShuffledBatches(Samples(draw=draw), 4, 0)) for _ in range(2))
    assert find_differences(one, other) == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_data_that_are_read_once_and_held_out_batches_are_not_verified():
    one = identity(data=iter(batches()), held_out=batches(1))
    other = identity(data=iter(batches(seed=7)), held_out=batches(1, seed=7))
    assert set(find_differences(one, other)) == {f"{UNVERIFIED}.first batch", f"{UNVERIFIED}.held-out batches"}


def test_held_out_batches_that_are_training_data_are_refused():
    data = batches(4)
    dataset = [{"sample": torch.full((1, 8, 8), float(number))} for number in range(4)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    for training, held_out in (
        (data, data[2:]),
        (iter(data), [batches(1)[0]]),
        (loader, torch.utils.data.DataLoader(dataset, batch_size=3)),
    ):
        with pytest.raises(TrainingError, match="are training data"):
            read_held_out(held_out, 4, BatchStream(training))
    assert read_held_out(batches(3, seed=9), 2, BatchStream(data))[1]["sample"].shape == (8, 1, 8, 8)
    # Samplers may divide one dataset.
    training, others = ([0, 1], [2, 3])
    loader, held_out = (torch.utils.data.DataLoader(dataset, sampler=part) for part in (training, others))
    assert len(read_held_out(held_out, 4, BatchStream(loader))) == 2
    model, graft = build({"self_attention[1]": "hyena_x"})
    with pytest.raises(TrainingError, match="are training data"):
        dg.distill(model, graft, data, noise_scheduler=DDPMScheduler(), held_out=data)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match="are training data"):
        dg.finetune(model, data, noise_scheduler=DDPMScheduler(), held_out=data)
