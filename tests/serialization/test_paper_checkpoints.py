"""The paper's checkpoints: read safely, recognised by their tensors, and computing what the original computes."""

import argparse
import re

import pytest
import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub import HfApi
from safetensors import safe_open

import diffusers_graft as dg
from benchmarks.paper_table import released
from diffusers_graft.errors import FileError, StateError, UnknownNameError
from diffusers_graft.serialization.paper_checkpoints import import_upstream

from .forging import read_mark
from .reference_dit import ATTENTIONS, HEADS, MLPS, WIDTH, reference
from .test_upload import cached, hub  # noqa: F401

SIZES = {"num_attention_heads": HEADS, "sample_size": 8}
CASES = (
    [(attn, "mlp_r4") for attn in ATTENTIONS]
    + [("mha", mlp) for mlp in MLPS if mlp != "mlp_r4"]
    + [("hyena_x", "mlp_r3")]
)
NAMES = {
    "mha": set(),
    "swa": {"sliding_window"},
    "mlp_r3": {"mlp"},
    "mlp_r6": {"mlp"},
    "mlp_r4": set(),
    "mlp_hyena_x": {"hyena_mlp"},
}


def released_file(path, model):
    """A pickle as the paper's training code writes it."""
    state = model.state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": other, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(image_size=256)}, path)
    return path


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 8, 8, generator=generator), torch.tensor([0, 7, 999]), torch.tensor([1, 4, 5])


@torch.no_grad()
def run(model):
    latents, t, y = inputs()
    return model(latents, timestep=t, class_labels=y).sample


@pytest.mark.parametrize(("attn", "mlp"), CASES)
def test_it_computes_what_the_original_computes(attn, mlp, tmp_path):
    original = reference(attn, mlp)
    model = import_upstream(released_file(tmp_path / "model.pt", original), **SIZES)
    with torch.no_grad():
        expected = original(*inputs())
    assert expected.abs().max() > 0.1
    assert (run(model) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    operators = {edit.config.owner.name for edit in model.graft.plan.edits}
    assert operators == NAMES.get(attn, {attn}) | NAMES[mlp]
    assert {edit.site.path.split(".")[1] for edit in model.graft.plan.edits} <= {"1", "3"}
    model.save_pretrained(tmp_path / "ours")
    again = dg.load_pretrained(tmp_path / "ours")
    assert torch.equal(run(again), run(model))


def test_the_settings_are_read_off_the_tensors(tmp_path):
    plans = {
        attn: import_upstream(released_file(tmp_path / "model.pt", reference(attn)), **SIZES).graft.plan
        for attn in ("hyena_y", "mamba2", "swa")
    }
    settings = {name: plan.edits[0].config.to_dict() for name, plan in plans.items()}
    assert settings["hyena_y"]["kernel_size"] == 3
    assert {name: settings["mamba2"][name] for name in ("state", "expand", "conv", "head_width", "bidirectional")} == {
        "state": 8,
        "expand": 2,
        "conv": 4,
        "head_width": 4,
        "bidirectional": False,
    }
    assert settings["swa"]["window"] == (4, 4)


def test_without_the_edit_of_the_frequencies_the_output_is_another(tmp_path):
    """The edit comes back with the model, and the card says so."""
    model = import_upstream(released_file(tmp_path / "model.pt", reference("hyena_x")), **SIZES)
    expected = run(model)
    model.save_pretrained(tmp_path / "ours")
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "downscale_freq_shift" in card
    assert "1e-06" in card
    assert {row["value"] for row in read_mark(tmp_path / "ours")["settings"]} == {0}
    again = dg.load_pretrained(tmp_path / "ours")
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(run(dg.load_pretrained(tmp_path / "twice")), expected)
    for block in again.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    assert (run(again) - expected).abs().max() > 0.01 * expected.abs().max()


def test_it_stands_on_its_own(tmp_path):
    model = import_upstream(released_file(tmp_path / "model.pt", reference("hyena_x")), **SIZES)
    with pytest.raises(StateError, match="loaded in full"):
        model.unset_graft()
    model.save_pretrained(tmp_path / "ours")
    with safe_open(tmp_path / "ours" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert any(".graft." in name for name in file.keys())  # noqa: SIM118


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def damaged(change):
    def make(path):
        state = reference("hyena_x").state_dict()
        change(state)
        torch.save({"ema": state}, path)

    return make


DAMAGE = {
    "no file": (lambda path: None, "There is no file .* Give the path of a model.pt"),
    "code in the pickle": (lambda path: torch.save({"ema": {"x": Evil()}}, path), "holds more than tensors"),
    "no pickle": (lambda path: path.write_bytes(b"x" * 100), r"holds more than tensors, or is damaged\.$"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "a list": (lambda path: torch.save([1, 2], path), "no 'ema' of tensors"),
    "other tensors": (lambda path: torch.save({"ema": {"x": torch.zeros(2)}}, path), "not a checkpoint of a DiT"),
    "a missing block": (
        damaged(lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.1.")]),
        "lacks blocks",
    ),
    "an unknown operator": (
        damaged(lambda s: s.update({"blocks.1.attn.extra": torch.zeros(2)})),
        "operator in blocks.1.attn",
    ),
    "a missing bias": (damaged(lambda s: s.pop("blocks.1.attn.in_proj.bias")), "fit"),
    "another shape": (damaged(lambda s: s.update({"blocks.0.mlp.fc2.weight": torch.zeros(16, 9)})), "fit"),
    "no number": (damaged(lambda s: s["blocks.0.mlp.fc2.weight"].fill_(float("nan"))), "not finite"),
    "another size": (damaged(lambda s: s.update(pos_embed=torch.zeros(1, 64, 16))), "Give sample_size=16"),
    "other positions": (damaged(lambda s: s["pos_embed"].add_(1)), "other positions"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_anything_else_is_refused(name, tmp_path, capsys):
    make, words = DAMAGE[name]
    make(tmp_path / "model.pt")
    with pytest.raises(FileError, match=words):
        import_upstream(tmp_path / "model.pt", **SIZES)
    assert not capsys.readouterr().out


def test_offline_says_how_to_go_online():
    with pytest.raises(FileError, match="unset HF_HUB_OFFLINE"):
        import_upstream("user/name")


def test_heads_must_divide(tmp_path):
    with pytest.raises(FileError, match="Give num_attention_heads"):
        import_upstream(released_file(tmp_path / "model.pt", reference()), num_attention_heads=5, sample_size=8)


def test_a_folder_or_repository_holds_one_checkpoint(tmp_path):
    released_file(tmp_path / "model.pt", reference())
    import_upstream(tmp_path, **SIZES)
    released_file(tmp_path / "other.pt", reference())
    with pytest.raises(FileError, match="holds 2 checkpoints"):
        import_upstream(tmp_path, **SIZES)


THEIRS = {
    "mha": "mha",
    "mlp_r_4": "mlp_r4",
    "mlp_r_3": "mlp_r3",
    "mlp_r_6": "mlp_r6",
    "mamba_2": "mamba2",
}  # where our reference differs


@pytest.mark.parametrize("hub", [False], indirect=True)
def test_the_22_released_names(hub, tmp_path):  # noqa: F811
    """Each from its repository: operators, layers and settings are those that the paper tells of it."""
    api = HfApi(token="hf_paper")
    assert len(released()) == 22
    for name, told in released().items():
        kind, operator, share = re.match(r"dit-xl2-(mha|mlp)-(\w+)-(\d+)p-", name).groups()
        operator = "mlp_hyena_x" if (kind, operator) == ("mlp", "hyena_x") else THEIRS.get(operator, operator)
        bare = DiTTransformer2DModel(
            **{
                "num_attention_heads": HEADS,
                "attention_head_dim": WIDTH // HEADS,
                "num_layers": 4,
                "sample_size": 8,
                "in_channels": 2,
                "out_channels": 4,
                "num_embeds_ada_norm": 5,
            }
        )
        edits = dg.plan_graft(bare, rules).edits if (rules := told["rules"]) else ()
        assert len(edits) == (4 * int(share) // 100 if rules else 0)
        replaced = {int(edit.site.path.split(".")[1]) for edit in edits} or range(4)
        original = reference(**{"attn" if kind == "mha" else "mlp": operator}, replaced=replaced)
        api.create_repo(f"grafting/{name}")
        api.upload_file(
            repo_id=f"grafting/{name}", path_or_fileobj=released_bytes(tmp_path, original), path_in_repo="model.pt"
        )
        model = import_upstream(f"grafting/{name}", **SIZES, **cached(tmp_path))
        assert [(edit.site.path, edit.config.owner.name) for edit in model.graft.plan.edits] == [
            (edit.site.path, edit.config.owner.name) for edit in edits
        ], name
        if rules and "expansion" in next(iter(rules.values())):
            assert {edit.config.expansion for edit in model.graft.plan.edits} == {
                edit.config.expansion for edit in edits
            }
    assert f"`grafting/{name}`" in dg.card(model)


def released_bytes(folder, model):
    return released_file(folder / "model.pt", model).read_bytes()


def test_a_license_that_the_hub_does_not_know_is_refused_before_anything_is_read():
    with pytest.raises(UnknownNameError, match="There is no license of the Hub"):
        dg.import_upstream("nowhere/model.pt", license="CC-BY-NC 4.0")
