"""The one writer and reader of files: all or nothing, and nothing but regular files."""

import errno
import json
import os
import socket
from pathlib import Path

import pytest
import torch

from diffusers_graft.core import storage
from diffusers_graft.core.storage import (
    append_text,
    create_folder,
    finish_save,
    nest,
    open_tensors,
    pack,
    parse_json,
    read_header,
    read_json,
    read_tensors,
    read_text,
    replace_files,
    unpack,
    write_json,
    write_tensors,
    write_text,
)
from diffusers_graft.errors import FileError

READERS = {"text": read_text, "json": read_json, "header": read_header, "tensors": read_tensors}


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


SPECIAL = {
    "pipe": os.mkfifo,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "socket": make_socket,
}


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def save(folder, text, stale=(), name="b"):
    with replace_files(folder, stale=stale) as temporary:
        write_text(temporary / "a", text)
        write_text(temporary / name, text)


def create(path, fault):
    with create_folder(path) as folder:
        write_text(folder / "a", "1")
        fault()


def interrupted(*arguments):
    raise KeyboardInterrupt


def disk_full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_reading_anything_but_a_regular_file_is_refused_without_waiting(reader, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    SPECIAL[kind](Path("special"))
    with pytest.raises(FileError, match="special (is not a regular file|cannot be read)"):
        reader("special")


@pytest.mark.parametrize("kind", SPECIAL)
def test_nothing_but_regular_files_is_written_over(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SPECIAL[kind](Path("special"))
    with pytest.raises(FileError, match="special is not a regular file"):
        write_json("special", {})
    with pytest.raises(FileError, match="special is not a regular file"):
        append_text("special", "a line")
    with pytest.raises(FileError, match="special is not a regular file"):
        save(Path(), "new", name="special")
    assert [path.name for path in Path().iterdir()] == ["special"]


def test_a_link_to_a_regular_file_is_read(tmp_path):
    write_text(tmp_path / "blob", "{}")
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    assert read_json(tmp_path / "config.json") == {}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_missing_file_is_named(reader, tmp_path):
    with pytest.raises(FileError, match=f"There is no weights in {tmp_path}"):
        reader(tmp_path / "weights")


def test_a_file_that_is_too_large_or_no_text_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"\xff" * 9)
    with pytest.raises(FileError, match="more than 8 bytes"):
        read_text(tmp_path / "file", limit=8)
    with pytest.raises(FileError, match="it is not text"):
        read_text(tmp_path / "file", limit=9)
    assert len(read_text(tmp_path / "file", errors="surrogateescape")) == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "holds no JSON object"),
        ("{", "it is not JSON"),
        ('{"scale": NaN}', "NaN is not a finite number"),
        ('{"alpha": 1e999}', "1e999 is not a finite number"),
        ('{"rank": 1%s}' % ("0" * 40), "larger than any number"),
        ('{"rank": 1%s}' % ("0" * 9999), "not JSON"),
        ('{"file": "\\ud800"}', "not JSON"),
        ('{{"deep": {}1{}}}'.format("[" * 65, "]" * 65), "nested deeper than 64"),
        ('{"deep": %s' % ("[" * 300_000), "nested deeper than 64"),
        ('{"wide": [%s1]}' % ("1," * 600_000), "holds 600,002 items; a description has at most 500,000"),
    ],
    ids=["list", "cut", "nan", "infinite", "large", "huge", "surrogate", "deep", "deeper", "wide"],
)
def test_json_that_no_save_writes_is_refused(text, words):
    with pytest.raises(FileError, match=words):
        parse_json(text, "there")


def test_json_of_every_kind_comes_back(tmp_path):
    data = {"text": "\U0001f331, \u00e4", "seed": 2**64 - 1, "rate": 1e-300, "nested": [{"a": None}, True]}
    write_json(tmp_path / "data.json", data)
    assert read_json(tmp_path / "data.json") == data
    write_text(tmp_path / "plain.json", json.dumps(data, ensure_ascii=False))
    assert read_json(tmp_path / "plain.json") == data


def test_json_without_finite_numbers_is_not_written(tmp_path):
    write_json(tmp_path / "data.json", {"loss": 1.0})
    with pytest.raises(FileError, match="not finite"):
        write_json(tmp_path / "data.json", {"loss": float("nan")})
    assert read_json(tmp_path / "data.json") == {"loss": 1.0}


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("fault", [interrupted, disk_full], ids=["interrupted", "full"])
def test_a_file_whose_replacing_fails_is_unchanged(step, fault, tmp_path, monkeypatch):
    write_json(tmp_path / "data.json", {"old": 1})
    before = contents(tmp_path)
    monkeypatch.setattr(os, step, fault)
    with pytest.raises((KeyboardInterrupt, FileError), match="unchanged" if fault is disk_full else None):
        write_json(tmp_path / "data.json", {"new": 1})
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_a_pipe_under_the_name_of_the_temporary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / f".data.json.{os.getpid()}.tmp")
    write_json(tmp_path / "data.json", {})
    assert contents(tmp_path) == {"data.json": "{}\n"}


@pytest.mark.parametrize("fault", [interrupted, disk_full], ids=["interrupted", "full"])
def test_a_folder_is_there_complete_or_not_at_all(fault, tmp_path):
    path = tmp_path / "runs" / "step-1"
    with pytest.raises((KeyboardInterrupt, FileError)):
        create(path, fault)
    assert not list(path.parent.iterdir())
    with create_folder(path) as folder:
        (folder / "deep").mkdir()
        write_text(folder / "deep" / "a", "1")
        assert not path.exists()
    assert (path / "deep" / "a").read_text() == "1"
    with pytest.raises(FileError, match="is there already"), create_folder(path):
        pass
    assert [entry.name for entry in path.parent.iterdir()] == ["step-1"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
@pytest.mark.parametrize("fault", [interrupted, disk_full], ids=["interrupted", "full"])
def test_a_save_that_fails_before_its_decision_changes_nothing(step, fault, tmp_path, monkeypatch):
    save(tmp_path, "old")
    monkeypatch.setattr(os, step, fault)
    with pytest.raises((KeyboardInterrupt, FileError), match="unchanged" if fault is disk_full else None):
        save(tmp_path, "new", stale=["mine"])
    monkeypatch.undo()
    assert contents(tmp_path) == {"a": "old", "b": "old"}


@pytest.mark.parametrize("stop", range(2))
def test_a_save_that_was_decided_is_finished_by_the_next_reader(stop, tmp_path, monkeypatch):
    save(tmp_path, "old")
    write_text(tmp_path / "gone", "")
    replace = os.replace
    count = iter(range(9))

    def killed(*arguments):
        if next(count) == stop:
            raise KeyboardInterrupt
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "new", stale=["gone", "a", "never there"])
    monkeypatch.undo()
    finish_save(tmp_path)
    assert contents(tmp_path) == {"a": "new", "b": "new"}


def test_an_interrupted_save_from_elsewhere_reaches_nothing_outside_its_folder(tmp_path):
    write_text(tmp_path / "mine", "x")
    folder = tmp_path / "graft"
    (folder / ".saved").mkdir(parents=True)
    write_text(folder / ".hidden", "y")
    write_text(folder / ".saved" / ".stale", f"../mine\n{tmp_path}/mine\n.hidden\n")
    finish_save(folder)
    assert (tmp_path / "mine").read_text() == "x"
    assert contents(folder) == {".hidden": "y"}


def test_leftovers_of_killed_saves_go_after_a_day(tmp_path):
    for age, name in [(0, ".saving-young"), (2 * storage._ONE_DAY, ".saving-old")]:
        (tmp_path / name).mkdir()
        moment = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (moment, moment))
    save(tmp_path, "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", ".saving-young"}


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(FileError, match="is a file. Give a folder"):
        save(tmp_path / "file", "new")
    with pytest.raises(FileError, match="cannot be written"):
        save(tmp_path / "file" / "deeper", "new")


def test_lines_are_added_to_a_file(tmp_path):
    append_text(tmp_path / "log", "one\n")
    append_text(tmp_path / "log", "two\n")
    assert read_text(tmp_path / "log") == "one\ntwo\n"


def test_tensors_that_share_memory_come_back_under_every_name(tmp_path):
    tied = torch.arange(6.0).view(2, 3)
    write_tensors(tmp_path / "weights", {"a": tied, "b": tied, "c": tied.T}, {"made": "here"})
    assert read_header(tmp_path / "weights") == {"format": "pt", "made": "here"}
    loaded = read_tensors(tmp_path / "weights")
    assert torch.equal(loaded["a"], tied)
    assert torch.equal(loaded["b"], tied)
    assert torch.equal(loaded["c"], tied.T)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o644


def test_rows_of_a_file_are_read_alone_and_faults_of_reading_are_explained(tmp_path):
    write_tensors(tmp_path / "weights", {"a": torch.arange(6).view(3, 2)})
    with open_tensors(tmp_path / "weights") as file:
        assert file.get_slice("a")[1].tolist() == [2, 3]
    with pytest.raises(FileError, match="weights is damaged"), open_tensors(tmp_path / "weights") as file:
        file.get_tensor("b")
    write_text(tmp_path / "cut", "xx")
    with pytest.raises(FileError, match="cut is damaged"):
        read_tensors(tmp_path / "cut")


def test_nested_values_come_back_through_files(tmp_path):
    value = {
        "optimizer": {0: {"step": torch.tensor(3.0), "moments": [torch.ones(2), torch.zeros(2)]}},
        "size": (8, None, True),
        "texts": ["a", 0.5],
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
    }
    structure, tensors = pack(value, "state")
    assert "state.optimizer.0.moments.1" in tensors
    write_tensors(tmp_path / "tensors", tensors)
    write_json(tmp_path / "structure", structure)
    again = unpack(read_json(tmp_path / "structure"), read_tensors(tmp_path / "tensors"))
    assert again["size"] == value["size"]
    assert again["texts"] == value["texts"]
    assert again["a.b"] == 1
    assert again["a"]["b"] == 2
    assert again["optimizer"][0]["step"] == 3
    assert again["optimizer"][0]["moments"][0].tolist() == [1, 1]


def test_a_value_that_is_no_data_is_not_packed():
    with pytest.raises(FileError, match="type object cannot be stored"):
        pack({"cache": object()})


@pytest.mark.parametrize("structure", [{"odd": 1}, {}, {"tensor": "none"}, {"dict": 3}, {"a": 1, "b": 2}])
def test_a_structure_that_was_never_packed_is_refused(structure):
    with pytest.raises((ValueError, LookupError, TypeError)):
        unpack(structure, {})


def test_structures_of_the_first_versions_are_read():
    one = torch.ones(1)
    old = {"dict": [["inputs", {"list": [{"tensor": "inputs.0"}, {"tuple": [1]}]}], ["state", {"items": [[0, [2]]]}]]}
    assert unpack(old, {"inputs.0": one}) == {"inputs": [one, (1,)], "state": {0: [2]}}


def test_packed_names_of_nested_dicts_are_enough_to_nest_them_again():
    batch = {"sample": torch.ones(1), "added": {"size": torch.zeros(1)}}
    assert nest(pack(batch)[1]) == batch
