"""Batches of datasets as people have them."""

import logging

import pytest
import torch
from PIL import Image

import diffusers_graft as dg

from ..models import SCHEDULER, batches, tensors_of
from ..test_trainer import Singles, second_stage
from .pipelines import dit_pipeline, pixart_pipeline


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        singles = Singles()
        return (singles[index] for index in range(len(singles)))


def trained(folder, data, **settings):
    one = second_stage(folder, steps=3, train_dataset=data, **settings)
    one.train()
    return tensors_of(one.model)


def test_single_samples_of_an_iterable_are_batched_in_their_order(tmp_path):
    singles = list(Streamed())
    whole = [
        {name: torch.stack([one[name] for one in singles[i : i + 5]]) for name in singles[0]} for i in range(0, 20, 5)
    ]
    expected = trained(tmp_path / "batches", whole)
    for number, data in enumerate([Streamed(), iter(singles)]):
        found = trained(tmp_path / str(number), data)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    shuffled = trained(tmp_path / "list", singles)
    assert all(torch.equal(tensor, shuffled[name]) for name, tensor in trained(tmp_path / "map", Singles()).items())


def test_columns_that_the_model_does_not_take_are_dropped_with_one_warning(tmp_path, caplog):
    class Wide(Singles):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "url": None, "caption": "a", "size": (8, 8)}

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([{**batch, "caption": ["a"] * len(batch["sample"])} for batch in batches()])

    with caplog.at_level(logging.WARNING, "diffusers_graft"):
        plain = trained(tmp_path / "plain", Singles())
        assert not caplog.records
        wide = trained(tmp_path / "wide", Wide())
        assert [record.getMessage() for record in caplog.records] == [
            "DiTTransformer2DModel does not take url, caption, size: dropped from the data."
        ]
        assert all(torch.equal(tensor, wide[name]) for name, tensor in plain.items())
        trained(tmp_path / "batches", Batches())
    with pytest.raises(dg.GraftError, match="does not take"):
        trained(tmp_path / "kept", Batches(), remove_unused_columns=False)


def pictures(**columns):
    images = [Image.new("RGB", (10, 8), (25 * number, 0, 0)) for number in range(8)]
    return [
        {"image": image, **{name: values(number) for name, values in columns.items()}}
        for number, image in enumerate(images)
    ]


@pytest.mark.parametrize("kind", ["captions", "labels"])
def test_pictures_with_captions_or_labels_are_encoded_as_they_are_read(kind, tmp_path):
    pipe, columns = {
        "captions": (pixart_pipeline(), {"text": lambda number: "a" * (number + 1)}),
        "labels": (dit_pipeline(), {"label": lambda number: number}),
    }[kind]
    encoder = dg.data.SampleEncoder(pipe, size=8)
    data = pictures(**columns)
    batch = encoder(data[:2])
    assert batch["sample"].shape == (2, 4, 8, 8)
    if kind == "captions":
        assert batch["encoder_hidden_states"].unique().tolist() == [1.0, 2.0]
    else:
        assert batch["class_labels"].tolist() == [0, 1]
    finetune = dg.FinetuneConfig(steps=2, warmup=0, progress=False)
    arguments = dg.GraftTrainingArguments(
        output_dir=tmp_path, distill=None, finetune=finetune, per_device_train_batch_size=4
    )
    rest = {"train_dataset": data, "noise_scheduler": SCHEDULER}
    plan = {"self_attention[0]": "hyena_x"}
    with pytest.raises(dg.GraftError, match="SampleEncoder"):
        dg.GraftTrainer(pipe.transformer, plan, arguments, **rest).train()
    pipe.transformer.unset_graft()
    dg.GraftTrainer(pipe.transformer, plan, arguments, **rest, data_collator=encoder).train()
    with pytest.raises(dg.GraftError, match=r"has no (caption|class label); its columns are: image \(Image\)"):
        encoder(pictures())


def test_captions_are_found_beside_other_texts(tmp_path):
    encoder = dg.data.SampleEncoder(pixart_pipeline(), size=8)
    shard = pictures(__key__=lambda number: "000", url=lambda _: "https", txt=lambda number: "a" * (number + 1))
    assert encoder(shard[1:3])["encoder_hidden_states"].unique().tolist() == [2.0, 3.0]
    named = dg.data.SampleEncoder(pixart_pipeline(), size=8, caption="url")
    assert named(shard[:2])["encoder_hidden_states"].unique().tolist() == [5.0]
