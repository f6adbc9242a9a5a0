"""The Hub over real HTTP, with the real client, on this machine."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from huggingface_hub import HfApi, constants

import diffusers_graft as dg
from diffusers_graft.errors import FileError, StateError, UnknownNameError
from diffusers_graft.evaluation.evaluate import Scores
from diffusers_graft.serialization.hub_errors import explain_hub_errors
from diffusers_graft.serialization.upload import push_graft

from ..models import predict, tiny_dit
from ..versions import checks_cards_at_its_endpoint
from .fake_hub import FakeHub
from .forging import CONFIG, RULES, WEIGHTS, saved
from .pipelines import draw, pipeline

REPO = "owner/graft"
TOKEN = {"token": "hf_owner"}


@pytest.fixture(params=[False, True], ids=["regular", "lfs"])
def hub(request, tmp_path, monkeypatch):
    server = FakeHub(lfs=request.param)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "token", None)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "")
    yield server
    server.close()


only_regular = pytest.mark.parametrize("hub", [False], indirect=True, ids=["regular"])
only_lfs = pytest.mark.parametrize("hub", [True], indirect=True, ids=["lfs"])


@pytest.fixture
def graft(tmp_path):
    """A folder with a graft, and the outputs it must give."""
    return tmp_path / "graft", saved(tmp_path / "graft")


def cached(tmp_path):
    return {"cache_dir": str(tmp_path / "cache"), **TOKEN}


def test_push_and_load(hub, graft, tmp_path):
    folder, expected = graft
    assert hub.url in push_graft(folder, REPO, **TOKEN)
    files = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
    assert set(files) == {".gitattributes", CONFIG, WEIGHTS, "graft_proof.safetensors", "README.md"}
    assert bool(hub.objects) == hub.lfs
    model = tiny_dit()
    model.set_graft(REPO, **cached(tmp_path))
    assert torch.equal(predict(model), expected)


@only_regular
def test_a_graft_is_pinned_to_its_revision(hub, graft, tmp_path):
    folder, expected = graft
    first = push_graft(folder, REPO, **TOKEN).rpartition("/")[2]
    newer = saved(folder, rules={"self_attention[0]": "neighborhood"})
    push_graft(folder, REPO, **TOKEN)
    for revision, outputs in ((first, expected), ("main", newer), (None, newer)):
        model = tiny_dit()
        model.set_graft(REPO, revision=revision, **cached(tmp_path))
        assert torch.equal(predict(model), outputs)
    with pytest.raises(FileError, match="has no revision 'v9'"):
        tiny_dit().set_graft(REPO, revision="v9", **cached(tmp_path))


@only_regular
def test_pull_requests(hub, graft, tmp_path):
    folder, expected = graft
    saved(tmp_path / "first", rules={"self_attention[0]": "neighborhood"})
    push_graft(tmp_path / "first", REPO, **TOKEN)
    assert push_graft(folder, REPO, create_pr=True, token="hf_guest").endswith("/discussions/1")
    model = tiny_dit()
    model.set_graft(REPO, revision="refs/pr/1", **cached(tmp_path))
    assert torch.equal(predict(model), expected)


@only_regular
def test_private_repositories(hub, graft, tmp_path):
    push_graft(graft[0], REPO, private=True, **TOKEN)
    assert hub.repos[REPO].private
    for token, words in ((False, r"private to others \(401\).*token"), ("hf_guest", r"private to others \(404\)")):
        model = tiny_dit()
        with pytest.raises(FileError, match=words):
            model.set_graft(REPO, cache_dir=str(tmp_path / "cache"), token=token)
        assert model.graft is None
    tiny_dit().set_graft(REPO, **cached(tmp_path))


@only_regular
def test_offline_after_a_first_time(hub, graft, tmp_path):
    folder, expected = graft
    push_graft(folder, REPO, **TOKEN)
    with pytest.raises(FileError, match="not in the local cache.*drop local_files_only"):
        tiny_dit().set_graft(REPO, local_files_only=True, **cached(tmp_path))
    tiny_dit().set_graft(REPO, **cached(tmp_path))
    asked = len(hub.requests)
    model = tiny_dit()
    model.set_graft(REPO, local_files_only=True, **cached(tmp_path))
    assert torch.equal(predict(model), expected)
    assert len(hub.requests) == asked


@only_regular
def test_subfolders_of_a_repository(hub, graft, tmp_path):
    folder, expected = graft
    HfApi(**TOKEN).create_repo(REPO)
    HfApi(**TOKEN).upload_folder(repo_id=REPO, folder_path=folder, path_in_repo="deep/graft")
    model = tiny_dit()
    model.load_graft(REPO, subfolder="deep/graft", **cached(tmp_path))
    assert torch.equal(predict(model), expected)
    with pytest.raises(FileError, match="no folder other"):
        tiny_dit().load_graft(REPO, subfolder="other", **cached(tmp_path))


def test_a_dropped_connection_is_resumed(hub, graft, tmp_path, monkeypatch):
    folder, expected = graft
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    push_graft(folder, REPO, **TOKEN)
    hub.fail("GET", WEIGHTS, after=5000)
    model = tiny_dit()
    model.set_graft(REPO, **cached(tmp_path))
    assert torch.equal(predict(model), expected)
    ranges = [given for method, path, given in hub.requests if method == "GET" and path.endswith(WEIGHTS)]
    assert ranges == [None, "bytes=5000-"]


@only_regular
def test_a_connection_that_keeps_dropping_installs_nothing(hub, graft, tmp_path):
    folder, expected = graft
    push_graft(folder, REPO, **TOKEN)
    hub.fail("GET", WEIGHTS, after=0, times=99)
    model = tiny_dit()
    with pytest.raises(FileError, match="could not be"):
        model.set_graft(REPO, **cached(tmp_path))
    assert model.graft is None
    hub.faults.clear()
    model.set_graft(REPO, **cached(tmp_path))
    assert torch.equal(predict(model), expected)


STATUS = {
    401: "401.*private, or your token",
    403: "403.*no right",
    404: "does not exist|404",
    429: "429.*too many",
    500: "500.*Hub itself failed",
}


@only_regular
@pytest.mark.parametrize("status", STATUS)
@pytest.mark.parametrize("path", ["/api/models", "/resolve/"])
def test_refused_downloads_end_in_our_words(status, path, hub, graft, tmp_path):
    push_graft(graft[0], REPO, **TOKEN)
    for method in ("GET", "HEAD"):
        hub.fail(method, path, status, times=99)
    model = tiny_dit()
    with pytest.raises(FileError, match=f"{REPO} .*({STATUS[status]})"):
        model.set_graft(REPO, **cached(tmp_path))
    assert model.graft is None


@pytest.mark.parametrize("status", STATUS)
@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/commit/", "/lfs/"])
def test_refused_uploads_end_in_our_words(status, path, hub, graft):
    if path == "/lfs/" and not hub.lfs:
        path = "/api/validate-yaml|/preupload/"
    for method in ("POST", "PUT"):
        hub.fail(method, path, status, times=99)
    with pytest.raises(FileError, match=f"{REPO} .*({STATUS[status]}|reached)"):
        push_graft(graft[0], REPO, **TOKEN)
    files = hub.repos[REPO].commits if REPO in hub.repos else {}
    assert not any(WEIGHTS in commit for commit in files.values())


@only_regular
def test_pushing_without_the_right_to(hub, graft):
    with pytest.raises(FileError, match="401"):
        push_graft(graft[0], REPO, token=False)
    with pytest.raises(FileError, match="403.*no right"):
        push_graft(graft[0], REPO, token="hf_guest")
    for name in ("a b/c", "owner/graft/deep", ""):
        with pytest.raises(FileError, match="cannot exist|does not exist|could not"):
            push_graft(graft[0], name, **TOKEN)


def shown(error):
    """Everything a log shows of an error."""
    return "".join(traceback.format_exception(error)) + repr(error.args)


@only_regular
def test_the_line_break_of_a_tokens_file_is_no_part_of_it(hub, graft, tmp_path):
    push_graft(graft[0], REPO, token="hf_owner\n")
    model = tiny_dit()
    model.set_graft(REPO, cache_dir=str(tmp_path / "cache"), token="  hf_owner\r\n")
    assert torch.equal(predict(model), graft[1])


@only_regular
@pytest.mark.parametrize("end", ["", "\n", "\x00", " and more", "\u00e9", "\nsecond line"], ids=repr)
def test_no_message_shows_a_token(end, hub, graft, tmp_path):
    secret = "hf_abcdefghijKLMNOP0123"
    model = tiny_dit()
    model.set_graft(RULES)
    for call in (
        lambda: push_graft(graft[0], REPO, token=secret + end),
        lambda: model.push_to_hub(REPO, token=secret + end),
        lambda: tiny_dit().load_graft(REPO, cache_dir=str(tmp_path / "cache"), token=secret + end),
        lambda: dg.load_pretrained(REPO, cache_dir=str(tmp_path / "cache"), token=secret + end),
        lambda: dg.import_upstream(REPO, cache_dir=str(tmp_path / "cache"), token=secret + end),
    ):
        with pytest.raises(FileError) as raised:
            call()
        assert "abcdefghijKLMNOP" not in shown(raised.value)


def test_errors_that_show_a_token_are_no_cause():
    with pytest.raises(FileError) as raised, explain_hub_errors(REPO):
        raise OSError("Illegal header value b'Bearer hf_abcdefghijKLMNOP0123'")
    assert raised.value.__cause__ is None
    assert "abcdefghij" not in shown(raised.value)


@only_regular
def test_refused_metadata_ends_in_the_words_of_the_hub(hub, graft):
    hub.metadata_errors = ['"license" must be one of [mit, ...]', '"datasets[0]" is not valid']
    with pytest.raises(FileError, match=r'refuses the metadata of the card: - "license" must .* - "datasets\[0\]" is'):
        push_graft(graft[0], REPO, **TOKEN)
    assert WEIGHTS not in hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]


@only_regular
@pytest.mark.parametrize("page", [b"<html>Please log in</html>", {"status": "ok"}, []], ids=["html", "json", "list"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/repos/create"),
        ("GET", "/api/models/[^/]+/[^/]+$"),
        ("POST", "/preupload/"),
        ("POST", "/commit/"),
    ],
)
def test_pages_of_a_proxy_end_in_our_words(method, path, page, hub, graft):
    HfApi(**TOKEN).create_repo(REPO)
    hub.pages[method, path] = page
    with pytest.raises(FileError, match="owner/graft could not be"):
        push_graft(graft[0], REPO, **TOKEN)
    assert WEIGHTS not in hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]


@only_lfs
def test_a_failing_part_is_named_with_its_file(hub, graft):
    hub.fail("PUT", "/lfs/", 500, times=99)
    with pytest.raises(FileError, match=r"500.*Hub itself failed.*Error while uploading '\w+\.\w+'"):
        push_graft(graft[0], REPO, **TOKEN)


def edit_card(hub, words):
    repo = hub.repos[REPO]
    files = dict(repo.commits[repo.refs["main"]])
    files["README.md"] = files["README.md"].replace(b"## Edits", words + b"\n\n## Edits")
    repo.commit("main", files)


@only_regular
@pytest.mark.parametrize("times", [1, 99])
def test_a_card_that_is_edited_meanwhile_is_not_overwritten(times, hub, graft):
    push_graft(graft[0], REPO, **TOKEN)
    edits = []

    def somebody_edits(method, path):
        # after the card was read, before the commit
        if "/preupload/" in path and len(edits) < times:
            edits.append(b"Edit %d of somebody." % len(edits))
            edit_card(hub, edits[-1])

    hub.on_request = somebody_edits
    if times == 1:
        push_graft(graft[0], REPO, **TOKEN)
    else:
        with pytest.raises(FileError, match=r"changed meanwhile.*Nothing of it was overwritten"):
            push_graft(graft[0], REPO, **TOKEN)
    assert all(words.decode() in _card(hub, REPO) for words in edits)


@only_regular
def test_nothing_but_ours_is_uploaded(hub, graft):
    for name in (
        ".secret",
        "notes.pt",
        "model.bin",
        "credentials.json",
        "train.py",
        "config.json",
        "me.png",
        "base.safetensors",
    ):
        (graft[0] / name).write_text("x")
    (graft[0] / "diffusion_pytorch_model.safetensors").symlink_to(graft[0] / ".secret")
    (graft[0] / "checkpoints").mkdir()
    (graft[0] / "checkpoints" / "state.json").write_text("{}")
    push_graft(graft[0], REPO, **TOKEN)
    files = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
    assert set(files) == {".gitattributes", CONFIG, WEIGHTS, "graft_proof.safetensors", "README.md"}


@only_regular
def test_every_variant_is_looked_at_and_uploaded(hub, tmp_path):
    expected = saved(tmp_path / "graft", variant="bf16")
    push_graft(tmp_path / "graft", REPO, **TOKEN)
    model = tiny_dit()
    model.set_graft(REPO, variant="bf16", **cached(tmp_path))
    assert torch.equal(predict(model), expected)
    (tmp_path / "graft" / WEIGHTS).write_bytes(b"x")
    with pytest.raises(FileError, match="damaged"):
        push_graft(tmp_path / "graft", REPO, **TOKEN)


@only_regular
def test_a_damaged_graft_is_not_uploaded(hub, graft):
    path = graft[0] / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="damaged"):
        push_graft(graft[0], REPO, **TOKEN)
    assert not hub.requests


def test_full_models(hub, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    expected = predict(model)
    model.push_to_hub("owner/whole", **TOKEN)
    files = hub.repos["owner/whole"].commits[hub.repos["owner/whole"].refs["main"]]
    assert {"config.json", "graft_config.json", "diffusion_pytorch_model.safetensors", "README.md"} <= set(files)
    assert b"hyena_x" in files["README.md"]
    for loaded in (
        dg.load_pretrained("owner/whole", **cached(tmp_path)),
        DiTTransformer2DModel.from_pretrained("owner/whole", **cached(tmp_path)),
    ):
        assert torch.equal(predict(loaded), expected)


@only_regular
@pytest.mark.parametrize("order", [("whole", "graft"), ("graft", "whole")], ids=" then ".join)
def test_a_graft_and_a_full_model_in_one_repository(hub, order, graft, tmp_path):
    folder, expected = graft
    model = tiny_dit()
    model.set_graft(RULES)
    for kind in order:
        push_graft(folder, "owner/both", **TOKEN) if kind == "graft" else model.push_to_hub("owner/both", **TOKEN)
    loaded = tiny_dit()
    loaded.load_graft("owner/both", **cached(tmp_path))
    assert torch.equal(predict(loaded), expected)
    assert torch.equal(predict(dg.load_pretrained("owner/both", **cached(tmp_path))), predict(model))


@only_regular
def test_a_full_model_pushed_again_replaces_its_weights_and_no_others(hub, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.push_to_hub("owner/whole", max_shard_size="20KB", **TOKEN)
    model.push_to_hub("owner/whole", variant="bf16", **TOKEN)
    with torch.no_grad():
        model.proj_out_1.weight.mul_(2)
    model.push_to_hub("owner/whole", **TOKEN)
    files = hub.repos["owner/whole"].commits[hub.repos["owner/whole"].refs["main"]]
    assert {name for name in files if "diffusion_pytorch_model" in name} == {
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bf16.safetensors",
    }
    assert torch.equal(predict(dg.load_pretrained("owner/whole", **cached(tmp_path))), predict(model))
    other = dg.load_pretrained("owner/whole", variant="bf16", **cached(tmp_path))
    assert torch.equal(2 * other.proj_out_1.weight, model.proj_out_1.weight)


@only_regular
def test_pushing_takes_arguments_as_diffusers_does_and_passes_over_none(hub):
    model = tiny_dit()
    model.set_graft(RULES)
    model.push_to_hub(REPO, "my message", True, TOKEN["token"])
    assert hub.repos[REPO].private
    assert b"## Edits" in hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]["README.md"]
    before = len(hub.repos[REPO].commits)
    for verb in (
        model.push_to_hub,
        lambda repo, **given: model.save_pretrained("graft", push_to_hub=True, repo_id=repo, **given),
    ):
        with pytest.raises(UnknownNameError, match="no argument of saving a grafted model 'revision'"):
            verb(REPO, revision="dev", **TOKEN)
    assert len(hub.repos[REPO].commits) == before


@only_regular
def test_only_what_is_read_is_downloaded(hub, graft, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    for variant in (None, "other"):
        model.save_graft(graft[0], variant=variant)
        model.push_to_hub(REPO, variant=variant, **TOKEN)
    push_graft(graft[0], REPO, **TOKEN)
    for load, wanted in (
        (tiny_dit().load_graft, WEIGHTS),
        (dg.load_pretrained, "diffusion_pytorch_model.safetensors"),
    ):
        hub.requests.clear()
        load(REPO, cache_dir=tmp_path / wanted, **TOKEN)
        names = {path.rpartition("/")[2] for _, path, _ in hub.requests}
        assert {name for name in names if name.endswith(".safetensors")} - {"graft_proof.safetensors"} == {wanted}


@only_regular
def test_plain_models_go_as_ever(hub, tmp_path):
    model = tiny_dit()
    model.push_to_hub("owner/plain", **TOKEN)
    assert torch.equal(
        predict(DiTTransformer2DModel.from_pretrained("owner/plain", **cached(tmp_path))), predict(model)
    )
    with pytest.raises(FileError, match="describes no graft"):
        dg.load_pretrained("owner/plain", **cached(tmp_path))


def _card(hub, repo_id):
    return hub.repos[repo_id].commits[hub.repos[repo_id].refs["main"]]["README.md"].decode()


@only_regular
@checks_cards_at_its_endpoint
def test_a_card_on_the_hub_names_its_repository_and_keeps_what_was_written_there(hub, graft):
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_graft(graft[0], scores={"grafted": Scores({"loss": 0.5})})
    for repo_id, lines, push in (
        (REPO, 'model.set_graft("owner/graft")', lambda: push_graft(graft[0], REPO, **TOKEN)),
        ("owner/whole", 'dg.load_pretrained("owner/whole")', lambda: model.push_to_hub("owner/whole", **TOKEN)),
    ):
        push()
        assert lines in _card(hub, repo_id)
        huggingface_hub.ModelCard(_card(hub, repo_id).replace("## Edits", "A word of mine.\n\n## Edits")).push_to_hub(
            repo_id, **TOKEN
        )
        push()
        assert "A word of mine." in _card(hub, repo_id)
        assert _card(hub, repo_id).count(lines) == 1
    assert "model-index:\n- name: graft\n" in _card(hub, REPO)
    assert 'model.set_graft("graft")' in (graft[0] / "README.md").read_text()


@only_regular
def test_a_plain_model_takes_no_description_from_grafted_variants(hub, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.push_to_hub("owner/whole", variant="bf16", **TOKEN)
    expected = predict(model)
    with pytest.raises(StateError, match="owner/whole holds a grafted model .variant 'bf16'"):
        tiny_dit().push_to_hub("owner/whole", **TOKEN)
    with pytest.raises(StateError, match="owner/whole holds a grafted model .variant 'bf16'"):
        tiny_dit().save_pretrained(tmp_path / "plain", push_to_hub=True, repo_id="owner/whole", **TOKEN)
    assert not (tmp_path / "plain").exists()
    assert torch.equal(predict(dg.load_pretrained("owner/whole", variant="bf16", **cached(tmp_path))), expected)
    tiny_dit().push_to_hub("owner/whole", variant="bf16", **TOKEN)


@only_regular
def test_save_pretrained_can_push(hub, tmp_path):
    model = tiny_dit()
    model.set_graft(RULES)
    model.save_pretrained(tmp_path / "whole", push_to_hub=True, repo_id="owner/whole", **TOKEN)
    assert torch.equal(predict(dg.load_pretrained("owner/whole", **cached(tmp_path))), predict(model))


@only_regular
def test_the_base_is_named_with_its_commit(hub, tmp_path):
    """What a graft says of its base, when that came from the Hub."""
    tiny_dit().push_to_hub("owner/base", **TOKEN)
    commit = hub.repos["owner/base"].refs["main"]
    base = DiTTransformer2DModel.from_pretrained("owner/base", cache_dir=constants.HF_HUB_CACHE, **TOKEN)
    saved(tmp_path / "graft", base)
    card, config = ((tmp_path / "graft" / name).read_text() for name in ("README.md", CONFIG))
    assert f'"revision": "{commit}"' in config
    assert "base_model: owner/base" in card


@only_regular
@checks_cards_at_its_endpoint
@pytest.mark.parametrize(
    "entries",
    [{"license": "cc-by-nc-4.0"}, {"license": "other", "license_name": "ours", "license_link": "LICENSE.md"}],
    ids=["known", "other"],
)
def test_the_license_is_that_of_the_base(entries, hub, tmp_path):
    """From the card of its repository: asked for when the graft is saved, or found in the cache."""
    tiny_dit().push_to_hub("owner/base", **TOKEN)
    card = huggingface_hub.ModelCard(
        "---\n" + "".join(f"{name}: {value}\n" for name, value in entries.items()) + "---\n# Base\n"
    )
    card.push_to_hub("owner/base", **TOKEN)
    base = DiTTransformer2DModel.from_pretrained("owner/base", cache_dir=constants.HF_HUB_CACHE, **TOKEN)
    saved(tmp_path / "graft", base)
    base.save_pretrained(tmp_path / "whole")
    hub.repos.clear()
    base.save_graft(tmp_path / "cached")
    dg.load_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "again")
    for name in ("graft", "cached", "whole", "again"):
        head = huggingface_hub.ModelCard.load(tmp_path / name / "README.md").data.to_dict()
        assert {key: head.get(key) for key in entries} == entries, name
    base.save_graft(tmp_path / "mine", about={"license": "mit"})
    head = huggingface_hub.ModelCard.load(tmp_path / "mine" / "README.md").data.to_dict()
    assert (head["license"], "license_name" in head) == ("mit", False)


@only_regular
def test_a_base_without_a_license_gives_none(hub, tmp_path):
    tiny_dit().push_to_hub("owner/base", **TOKEN)
    saved(
        tmp_path / "graft",
        DiTTransformer2DModel.from_pretrained("owner/base", cache_dir=constants.HF_HUB_CACHE, **TOKEN),
    )
    assert "license" not in huggingface_hub.ModelCard.load(tmp_path / "graft" / "README.md").data.to_dict()


NEW_PROCESS = """
import sys, torch
from diffusers import DiffusionPipeline
import diffusers_graft
from tests.serialization.pipelines import draw
numpy = draw(DiffusionPipeline.from_pretrained(sys.argv[1], token="hf_owner"))
torch.save(torch.from_numpy(numpy), sys.argv[2])
"""


@only_regular
def test_pipelines(hub, tmp_path):
    pipe = pipeline()
    pipe.transformer.set_graft(RULES)
    expected = draw(pipe)
    pipe.save_pretrained(str(tmp_path / "pipe"), push_to_hub=True, repo_id="owner/pipe", **TOKEN)
    assert (draw(DiffusionPipeline.from_pretrained("owner/pipe", **cached(tmp_path))) == expected).all()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", NEW_PROCESS, "owner/pipe", str(tmp_path / "seen.pt")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert (torch.load(tmp_path / "seen.pt", weights_only=True).numpy() == expected).all()
