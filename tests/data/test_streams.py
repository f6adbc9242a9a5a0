"""Streams go on where they were, and several processes read one stream between them."""

import pytest
import torch
from datasets import Dataset

import diffusers_graft as dg
from diffusers_graft.data.streams import Stream, StreamBatches
from diffusers_graft.training import batches as batching
from diffusers_graft.training.batches import BatchStream, merge_places
from diffusers_graft.training.distributed import process_state

from ..models import SCHEDULER, tiny_dit
from ..training.test_distributed import assert_as_alone, fork_two


def numbers(count=40, shards=4):
    return Dataset.from_dict({"number": list(range(count))}).to_iterable_dataset(num_shards=shards)


def read(batches, count):
    return [next(batches) for _ in range(count)]


class Process:
    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


def on_process(monkeypatch, index, count, make):
    """What `make` returns on one of several processes."""
    for module in (batching, dg.data.streams):
        monkeypatch.setattr(module, "process_state", lambda: Process(index, count))
    return make()


STREAMS = {
    "in order": lambda: Stream(numbers(), lanes=4),
    "in blocks": lambda: Stream(numbers(), lanes=2, shuffle=7),
    "mapped": lambda: Stream(numbers().map(lambda row: {"number": row["number"] + 100}), lanes=3),
    "with a buffer": lambda: Stream(numbers().shuffle(seed=1, buffer_size=8), lanes=2),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_goes_on_where_it_was_in_any_epoch(kind):
    whole = BatchStream(StreamBatches(STREAMS[kind](), 3, list))
    expected = read(whole, 40)
    for stop in (0, 1, 5, 13, 14, 27):
        first = BatchStream(StreamBatches(STREAMS[kind](), 3, list))
        first.peek()
        assert read(first, stop) == expected[:stop]
        first.peek()
        again = BatchStream(StreamBatches(STREAMS[kind](), 3, list))
        again.peek()
        again.load_state_dict(first.state_dict())
        assert again.position == stop
        assert read(again, 40 - stop) == expected[stop:]


def test_every_sample_comes_once_an_epoch_and_blocks_are_shuffled():
    seen = [row["number"] for batch in read(iter(StreamBatches(STREAMS["in blocks"](), 4, list)), 10) for row in batch]
    assert sorted(seen) == list(range(40))
    assert seen != sorted(seen)


@pytest.mark.parametrize("lanes", [1, 4, 3])
@pytest.mark.parametrize("count", [2, 4, 3])
def test_processes_read_their_own_samples_of_the_same_batches(lanes, count, monkeypatch):
    def make():
        return BatchStream(StreamBatches(Stream(numbers(48, 6), lanes=lanes), 12, list))

    monkeypatch.setattr(batching, "make_share", lambda samples, collate: collate(samples))
    monkeypatch.setattr(dg.data.streams, "make_share", lambda samples, collate: collate(samples))
    expected = read(make(), 8)
    places = []
    for index in range(count):
        own = on_process(monkeypatch, index, count, make)
        assert read(own, 3) == [batch[index::count] for batch in expected[:3]]
        places.append(own.state_dict())
        if lanes % count == 0:
            # No process opens what another one reads.
            assert len(own.batches.lanes) == lanes // count
    alone = on_process(monkeypatch, 0, 1, make)
    alone.load_state_dict(merge_places(places))
    assert read(alone, 5) == expected[3:]


def test_what_is_no_stream_is_refused():
    with pytest.raises(dg.GraftError, match="streaming=True.*got list"):
        Stream([1])
    with pytest.raises(dg.GraftError, match="one lane and reads one sample"):
        Stream(numbers(), lanes=0)


def latents(count=12):
    generator = torch.Generator().manual_seed(0)
    rows = {
        "sample": torch.randn(count, 1, 8, 8, generator=generator).tolist(),
        "class_labels": torch.randint(5, (count,), generator=generator).tolist(),
        "url": ["a"] * count,
    }
    return Dataset.from_dict(rows).to_iterable_dataset(num_shards=4).with_format("torch")


def run(folder, steps=5, callbacks=(), **settings):
    """Weights after both stages on a stream."""
    model = tiny_dit()
    # Adam would make rounding large where a gradient is zero.
    both = {"optimizer": "SGD", "lr": 0.05, "warmup": 0, "save_every": 2, "schedule": "constant", "progress": False}
    arguments = dg.GraftTrainingArguments(
        output_dir=folder,
        distill=dg.DistillConfig(steps=steps, closed_form=dg.ClosedFormConfig(steps=2, progress=False), **both),
        finetune=dg.FinetuneConfig(steps=steps, **both),
        per_device_train_batch_size=4 // process_state().num_processes,
    )
    one = dg.GraftTrainer(
        model,
        {"self_attention[1]": {"operator": "hyena_x", "init": "random"}},
        arguments,
        train_dataset=latents(),
        noise_scheduler=SCHEDULER,
        callbacks=callbacks,
    )
    one.train(**settings)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Stop:
    """Ends the program in the middle of a stage, after its checkpoint."""

    def __init__(self, stage):
        self.stage = stage

    def on_save(self, args, state, control, **_):
        if (state.stage, state.global_step) == (self.stage, 4):
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_run_on_a_stream_that_was_stopped_ends_as_if_it_was_not(stage, tmp_path):
    expected = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", callbacks=[Stop(stage)])
    found = run(tmp_path / "cut", resume_from_checkpoint=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_two_processes_on_a_stream_end_where_one_does(tmp_path):
    first, second = fork_two(lambda: run(tmp_path / "run"), tmp_path)
    assert_as_alone(first, second, run(tmp_path / "alone"))
    # One process goes on with what two have begun.
    alone, resumed = (run(tmp_path / name, steps=7, resume_from_checkpoint=True) for name in ("alone", "run"))
    assert_as_alone(resumed, resumed, alone)
