"""Proofs: made with a save, replayed on load."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusers_graft as dg
from diffusers_graft.errors import FileError
from diffusers_graft.serialization import proof

from ..inspection.models import inputs_of, tiny
from ..models import predict, tiny_dit
from .forging import PROOF, saved

QWEN = "QwenImageTransformer2DModel"  # its arguments are not among the example inputs


def test_what_the_fingerprint_does_not_see_the_proof_does(tmp_path, caplog):
    saved(tmp_path)
    model = tiny_dit()
    table = model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight
    assert table.numel() > 2048
    with torch.no_grad():
        table.view(-1)[1] += 100
    with caplog.at_level("INFO"):
        model.load_graft(tmp_path)
    (told,) = [record for record in caplog.records if "proof replayed" in record.message]
    assert told.levelname == "WARNING"


def test_the_proof_is_replayed(tmp_path, caplog):
    saved(tmp_path)
    with caplog.at_level("INFO"):
        tiny_dit().load_graft(tmp_path)
    assert "largest difference 0" in caplog.text
    (tmp_path / "graft_proof.safetensors").unlink()
    tiny_dit().load_graft(tmp_path)
    assert "carries no proof" in caplog.text


WIDE = {
    "a wide window": {"operator": "sliding_window", "window": (30, 30)},
    "a kernel as wide as the grid": {"operator": "neighborhood", "kernel": 15},
}


@pytest.mark.parametrize("config", WIDE.values(), ids=WIDE)
def test_what_needs_many_tokens_is_proved_on_as_many(config, tmp_path, caplog):
    model = tiny_dit(sample_size=32)
    model.set_graft({"self_attention[0]": config})
    model.save_graft(tmp_path)
    again = tiny_dit(sample_size=32)
    with caplog.at_level("INFO"):
        again.load_graft(tmp_path)
    assert "largest difference 0" in caplog.text
    assert torch.equal(predict(again), predict(model))


def test_without_example_inputs_the_last_forward_is_the_proof(tmp_path, caplog):
    model = tiny(QWEN)
    model.set_graft({"joint_attention[0]": "hyena_x"})
    with torch.no_grad():
        model(**inputs_of(QWEN))
    model.save_graft(tmp_path)
    with caplog.at_level("INFO"):
        tiny(QWEN).load_graft(tmp_path)
    assert "largest difference 0" in caplog.text


def test_an_operator_that_breaks_on_few_tokens_is_proved_on_more(tmp_path, monkeypatch, caplog):
    owner = dg.operators.get("identity")
    runs = owner.forward

    def breaks(self, query, key, value, context):
        if query.shape[2] < 64:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        return runs(self, query, key, value, context)

    monkeypatch.setattr(owner, "forward", breaks)
    model = tiny_dit(sample_size=32)
    model.set_graft({"self_attention[0]": "identity"})
    model.save_graft(tmp_path)
    with caplog.at_level("INFO"):
        tiny_dit(sample_size=32).load_graft(tmp_path)
    assert "largest difference 0" in caplog.text


def test_a_graft_that_refuses_every_known_input_is_saved_without_a_proof(tmp_path, caplog):
    model = tiny_dit()
    model.set_graft({"self_attention[0]": {"operator": "neighborhood", "kernel": 9}})
    model.save_graft(tmp_path)
    assert "saved without a proof" in caplog.text
    assert "kernel 9" in caplog.text
    again = tiny_dit()
    again.load_graft(tmp_path)
    assert "carries no proof" in caplog.text
    assert torch.equal(predict(again, size=20), predict(model, size=20))


@torch.no_grad()
def qwen_with_a_forward(**arguments):
    model = tiny(QWEN)
    model.set_graft({"joint_attention[0]": "hyena_x"})
    model(**inputs_of(QWEN), **arguments)
    return model


def test_a_forward_as_pipelines_call_it_is_a_proof(tmp_path, caplog):
    qwen_with_a_forward(return_dict=False).save_graft(tmp_path)
    assert "without a proof" not in caplog.text
    with caplog.at_level("INFO"):
        tiny(QWEN).load_graft(tmp_path)
    assert "largest difference 0" in caplog.text


def test_a_forward_over_many_tokens_is_no_proof(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(proof, "_MOST_TOKENS", 3)
    qwen_with_a_forward().save_graft(tmp_path)
    assert "A proof is a forward over at most 3 tokens" in caplog.text
    assert load_file(tmp_path / PROOF) == {}


def test_a_proof_over_many_tokens_is_not_replayed(tmp_path, monkeypatch):
    qwen_with_a_forward().save_graft(tmp_path)
    monkeypatch.setattr(proof, "_MOST_TOKENS", 3)
    with pytest.raises(FileError, match="at most 3 tokens"):
        tiny(QWEN).load_graft(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"), [("hidden_states", (1, 1, 512, 512)), ("hidden_states", (9, 1, 8, 8)), ("class_labels", (3,))]
)
def test_a_proof_of_other_shapes_than_ours_is_not_run(name, shape, tmp_path, monkeypatch):
    saved(tmp_path)
    tensors = load_file(tmp_path / PROOF)
    tensors[f"inputs.{name}"] = torch.zeros(shape, dtype=tensors[f"inputs.{name}"].dtype)
    save_file(tensors, tmp_path / PROOF)
    monkeypatch.setattr(proof, "predict", lambda *arguments: pytest.fail("it was run"))
    model = tiny_dit()
    with pytest.raises(FileError, match=f"inputs.{name} is"):
        model.load_graft(tmp_path)
    assert model.graft is None


def test_a_proof_that_is_not_finite_is_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / PROOF)
    tensors["inputs.hidden_states"][0, 0, 0, 0] = float("inf")
    save_file(tensors, tmp_path / PROOF)
    with pytest.raises(FileError, match="not finite"):
        tiny_dit().load_graft(tmp_path)


def test_what_is_said_of_a_missing_proof_is_one_line(tmp_path, monkeypatch, caplog):
    model = tiny_dit()
    model.set_graft({"self_attention[0]": "identity"})
    monkeypatch.setattr(proof, "predict", lambda model, inputs: (_ for _ in ()).throw(TypeError(f"{model}\n{model}")))
    model.save_graft(tmp_path)
    (record,) = [record for record in caplog.records if "without a proof" in record.message]
    assert "\n" not in record.message
    assert len(record.message) < 400
