"""Samples of original and graft are drawn while the graft is trained, and move nothing of the training."""

import json

import pytest
import torch
from PIL import Image

import diffusers_graft as dg
from diffusers_graft.training import session

from .data.pipelines import dit_pipeline, pixart_pipeline
from .models import SCHEDULER, same_tensors, tensors_of

CALL = {"num_inference_steps": 1, "guidance_scale": 2.0}
SIZE = {"height": 8, "width": 8, "use_resolution_binning": False}


def pictures(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("samples/*/*.png"))


def train(folder, data, pipe, **settings):
    both = {"steps": 4, "lr": 1e-3, "warmup": 0, "log_every": 1, "progress": False, **settings.pop("both", {})}
    arguments = dg.GraftTrainingArguments(
        output_dir=folder,
        distill=dg.DistillConfig(**both),
        finetune=dg.FinetuneConfig(**both, ema_decay=0.5),
        samples=settings.pop("samples", None),
        per_device_train_batch_size=2,
        resolution=8,
    )
    one = dg.GraftTrainer(
        pipe.transformer,
        {"self_attention[1]": {"operator": "hyena_x", "init": "random"}},
        arguments,
        train_dataset=data,
        noise_scheduler=SCHEDULER,
        pipeline=pipe,
        **settings,
    )
    one.train()
    return one


def captioned():
    return [
        {"image": Image.new("RGB", (9, 8), (30 * number, 0, 0)), "text": "a" * (number + 1)} for number in range(4)
    ]


def test_samples_of_both_stages_lie_side_by_side_and_change_no_weight(tmp_path):
    config = dg.SampleConfig(conditions=["a", "bb"], every=3, seed=5, arguments={**CALL, **SIZE})
    plain = train(tmp_path / "plain", captioned(), pixart_pipeline())
    drawn = train(tmp_path / "drawn", captioned(), pixart_pipeline(), samples=config)
    assert same_tensors(drawn.model, tensors_of(plain.model))
    assert pictures(tmp_path / "plain") == []
    # Steps 3 and 4 of stage one, then 3 and 4 of stage two.
    names = [f"{kind}_{number:03d}.png" for kind in ("graft", "original") for number in (0, 1)]
    folders = [f"samples/step_{step:06d}" for step in (3, 4, 7, 8)]
    assert pictures(tmp_path / "drawn") == [f"{folder}/{name}" for folder in folders for name in names]
    rows = json.loads((tmp_path / "drawn/samples/samples.json").read_text())
    assert [(row["stage"], row["step"], row["conditions"], row["seeds"]) for row in rows] == [
        (stage, step, ["a", "bb"], [5, 6]) for stage, step in (("one", 3), ("one", 4), ("two", 7), ("two", 8))
    ]
    contents = {name: (tmp_path / "drawn" / name).read_bytes() for name in pictures(tmp_path / "drawn")}
    originals = [content for name, content in contents.items() if "original_000" in name]
    assert len(set(originals)) == 1
    assert len({content for name, content in contents.items() if name.endswith("graft_000.png")} - set(originals)) >= 3
    # What the pipeline draws afterwards is what it drew during the training.
    last = drawn.previews[0]._draw_all()
    drawn.model.unset_graft()
    torch.testing.assert_close(drawn.previews[0]._draw_all()[0], drawn.previews[0]._originals[0])
    assert not torch.equal(last[0], drawn.previews[0]._originals[0])


class Tracker:
    name = "fake"
    requires_logging_directory = False
    logged = []

    def __init__(self, run_name):
        self.run_name = run_name

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **_):
        if self.run_name == "evaluation":
            self.logged.append((step, values))

    def log_images(self, values, step):
        self.logged.append((step, {name: [array.shape for array in arrays] for name, arrays in values.items()}))

    def finish(self):
        pass


def test_trackers_are_given_pairs_of_pictures_and_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "get_available_trackers", lambda: ["fake"])
    monkeypatch.setattr(session, "LOGGER_TYPE_TO_CLASS", {"fake": Tracker})
    pipe = dit_pipeline()
    data = [{"sample": torch.randn(4, 8, 8), "class_labels": torch.tensor(number)} for number in range(4)]
    config = dg.SampleConfig(conditions=[1, 2, 3], every=2, arguments=CALL)
    held_out = [{**sample, "sample": -sample["sample"]} for sample in data]
    one = train(
        tmp_path, data, pipe, samples=config, eval_dataset=held_out, both={"trackers": ("fake",), "precision": "bf16"}
    )
    assert Tracker.logged == [
        (step, {f"{stage}/samples": [(8, 16, 3)] * 3}) for stage in ("one", "two") for step in (2, 4)
    ]
    scores = one.evaluate("after both")
    assert Tracker.logged[-1] == (0, {"evaluation/after both/denoising_loss": scores["denoising_loss"]})


def test_tensorboard_shows_samples(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = [{"sample": torch.randn(4, 8, 8), "class_labels": torch.tensor(number)} for number in range(4)]
    config = dg.SampleConfig(conditions=[1, 2], every=2, arguments=CALL)
    train(tmp_path, data, dit_pipeline(), samples=config, both={"trackers": ("tensorboard",)})
    events = EventAccumulator(str(tmp_path / "logs" / "stage-two")).Reload()
    assert [event.step for event in events.Images("two/samples")] == [2, 4]


def test_a_drawing_that_fails_ends_no_training(tmp_path, caplog):
    def draw(conditions, seed):
        raise RuntimeError("out of memory")

    preview = dg.Samples(draw, dg.SampleConfig(conditions=[1], every=2), tmp_path)
    data = [{"sample": torch.randn(4, 8, 8), "class_labels": torch.tensor(number)} for number in range(4)]
    train(tmp_path, data, dit_pipeline(), previews=[preview])
    assert "Samples could not be drawn, training goes on: out of memory" in caplog.text
    assert pictures(tmp_path) == []


def test_what_cannot_be_drawn_is_refused_before_training(tmp_path):
    with pytest.raises(dg.GraftError, match="list of prompts or of class labels; got 'a cat'"):
        dg.SampleConfig(conditions="a cat")
    with pytest.raises(dg.GraftError, match="every=0"):
        dg.SampleConfig(conditions=["a"], every=0)
    with pytest.raises(dg.GraftError, match="DiTPipeline takes no prompt, which 'a' would be; it takes class_labels"):
        dg.Samples(dit_pipeline(), dg.SampleConfig(conditions=["a"]))
    arguments = dg.GraftTrainingArguments(output_dir=tmp_path, samples=dg.SampleConfig(conditions=[1]))
    plan = {"self_attention[1]": "hyena_x"}
    model = dit_pipeline().transformer
    with pytest.raises(dg.GraftError, match="another model than the one to train"):
        dg.GraftTrainer(model, plan, arguments, train_dataset=[], pipeline=dit_pipeline())
    with pytest.raises(dg.GraftError, match="give the trainer pipeline=pipe"):
        dg.GraftTrainer(model, plan, arguments, train_dataset=[])
