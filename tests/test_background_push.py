"""A graft is pushed in the background while it is trained, and a Hub that is down ends no training."""

import json

import diffusers_graft as dg
from diffusers_graft.background_push import BackgroundPush

from .models import SCHEDULER, batches, predict, tiny_dit
from .serialization.test_upload import hub, only_regular  # noqa: F401


def train(folder, previews):
    model = tiny_dit()
    arguments = dg.GraftTrainingArguments(
        output_dir=folder,
        distill=None,
        finetune=dg.FinetuneConfig(steps=4, lr=1e-3, warmup=0, save_every=2, progress=False),
    )
    one = dg.GraftTrainer(
        model,
        {"self_attention[1]": "hyena_x"},
        arguments,
        train_dataset=batches(),
        noise_scheduler=SCHEDULER,
        previews=previews,
        callbacks=previews,
    )
    one.train()
    return model


@only_regular
def test_a_graft_is_pushed_after_every_checkpoint(hub, tmp_path):  # noqa: F811
    push = BackgroundPush(tmp_path, "owner/graft", token="hf_owner")
    model = train(tmp_path, [push])
    push.wait()
    repository = hub.repos["owner/graft"]
    files = repository.commits[repository.resolve("main")]
    assert {"README.md", "graft_config.json", "graft_model.safetensors"} <= set(files)
    for name, content in files.items():
        (tmp_path / "pulled").mkdir(exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    assert json.loads(files["graft_config.json"])["plan"]
    fresh = tiny_dit()
    fresh.load_graft(tmp_path / "pulled")
    assert predict(fresh).shape == predict(model).shape
    assert not (tmp_path / ".push").exists()


@only_regular
def test_a_hub_that_is_down_ends_no_training(hub, tmp_path, caplog):  # noqa: F811
    hub.fail("POST", "/api/repos/create", 503, times=99)
    push = BackgroundPush(tmp_path, "owner/graft", token="hf_owner")
    train(tmp_path, [push])
    push.wait()
    assert "was not pushed to owner/graft, training goes on" in caplog.text
    assert (tmp_path / "graft_config.json").exists()
