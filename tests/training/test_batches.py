"""Batches that are shuffled, counted, and taken up again."""

import itertools

import pytest
import torch

import diffusers_graft as dg
from diffusers_graft.errors import TrainingError
from diffusers_graft.training.batches import BatchStream, SequentialBatches, ShuffledBatches

from ..data.pipelines import SETTINGS, dit_pipeline
from ..models import SCHEDULER, batches, tiny_dit


class Numbers(torch.utils.data.Dataset):
    """Counts how often it is read."""

    def __init__(self, count=10):
        self.count, self.read = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read += 1
        return {"sample": torch.tensor([float(index)])}


def taken(batches, count):
    return [batch["sample"].flatten().tolist() for batch in itertools.islice(batches, count)]


def test_shuffled_batches_hold_every_sample_once_an_epoch():
    batches = taken(ShuffledBatches(Numbers(), 3, seed=0), 6)
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert len(set(first)) == len(set(second)) == 9
    assert first != second
    assert taken(ShuffledBatches(Numbers(), 3, seed=0), 6) == batches
    assert taken(ShuffledBatches(Numbers(), 3, seed=1), 6) != batches
    assert [len(batch) for batch in taken(ShuffledBatches(Numbers(2), 5, seed=0), 2)] == [2, 2]
    assert taken(ShuffledBatches(Numbers(), 3, seed=0, workers=1), 2) == batches[:2]


def test_batches_of_nothing_are_refused():
    for samples, size in (([], 4), ([1, 2], 0), ([1, 2], -1)):
        with pytest.raises(TrainingError, match=f"batches of {size} out of {len(samples)} samples"):
            ShuffledBatches(samples, size, seed=0)


def test_stages_take_batches_and_say_so_of_single_samples(tmp_path):
    found = dg.data.from_pipeline(dit_pipeline(), [0], 2, tmp_path, **SETTINGS)
    model = tiny_dit(in_channels=4)
    graft = dg.build_graft(model, dg.plan_graft(model, {"self_attention[0]": "hyena_x"}))
    for batches_given, held_out in ((found, None), (batches(1, channels=4), found)):
        with pytest.raises(TrainingError, match="pass a DataLoader"):
            dg.distill(model, graft, batches_given, noise_scheduler=SCHEDULER, held_out=held_out)
    model.set_graft(graft)
    with pytest.raises(TrainingError, match="pass a DataLoader"):
        dg.finetune(model, found, noise_scheduler=SCHEDULER)


def test_seeking_reads_nothing_of_a_dataset_and_all_of_an_iterator():
    expected = taken(ShuffledBatches(Numbers(), 3, seed=0), 9)
    data = Numbers()
    stream = BatchStream(ShuffledBatches(data, 3, seed=0))
    stream.seek(7)
    assert data.read == 0
    assert taken(stream, 2) == expected[7:]
    assert stream.position == 9
    stream = BatchStream({"sample": torch.tensor([float(i)])} for i in range(9))
    stream.seek(7)
    assert taken([stream.peek()], 1) == taken(stream, 1) == [[7.0]]


class ByEpoch:
    """A stream that is in another order in every epoch, as those of the `datasets` library."""

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([{"sample": torch.tensor([10.0 * self.epoch + i])} for i in range(5)])


def test_single_samples_in_order_are_batched_anew_every_epoch():
    batches = SequentialBatches(ByEpoch(), 2)
    assert taken(BatchStream(batches), 4) == [[0, 1], [2, 3], [10, 11], [12, 13]]
    stream = BatchStream(SequentialBatches(ByEpoch(), 2))
    stream.seek(3)
    assert taken(stream, 1) == [[12, 13]]
    with pytest.raises(TrainingError, match="batches of 0"):
        SequentialBatches(ByEpoch(), 0)


def test_workers_of_an_iterable_dataset_give_what_it_gives_without_them():
    class Counted(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([{"sample": torch.tensor([float(i)])} for i in range(5)])

    before = torch.get_rng_state()
    assert taken(SequentialBatches(Counted(), 2, workers=1), 2) == [[0, 1], [2, 3]]
    assert torch.equal(torch.get_rng_state(), before)
