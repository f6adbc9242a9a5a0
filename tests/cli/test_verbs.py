"""The verbs of the command line, and its refusals in one line."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_graft as dg
from diffusers_graft.cli.main import build_parser, main
from diffusers_graft.testbed import quickstart as qs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--operator", "neighbourhood"], "Did you mean 'neighborhood'"),
        (["--sites", "self_attention[9]"], "matches nothing"),
        (["--operator", "neighborhood(kernel=4)"], "odd"),
        (["--sites", "feed_forward[0]"], "replaces self_attention"),
    ],
)
def test_refusals_are_one_line(arguments, words, capsys, tmp_path):
    assert main(["quickstart", "--output", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sites", "/nonexistent"], "no model of diffusers in /nonexistent"),
        (["sites", "user/name"], "no model of diffusers in user/name"),
        (["sites", "testbed:digits"], "Available: testbed:letters, testbed:scenes"),
    ],
)
def test_refusals_of_other_verbs_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read_or_written_are_one_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": 5}')
    for arguments in (["sites", str(tmp_path)], ["quickstart", "--output", str(tmp_path / "config.json")]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_package_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["diffusers_graft", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("diffusers_graft", run_name="__main__")
    assert capsys.readouterr().out == f"diffusers-graft {dg.__version__}\n"


def test_every_option_says_what_it_is():
    verbs = next(action for action in build_parser()._actions if action.dest == "verb").choices
    assert not [(verb, action.dest) for verb, parser in verbs.items() for action in parser._actions if not action.help]


def test_ctrl_c_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(qs, "analyze", interrupt)
    assert main(["quickstart", "--output", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_listings(capsys):
    assert main(["operators"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in dg.operators.available())
    assert main(["sites"]) == 0
    assert "self_attention[7]" in capsys.readouterr().out


HEAVY = """
import sys
import diffusers_graft_cli
for flag in ("--help", "--version"):
    try:
        diffusers_graft_cli.main([flag])
    except SystemExit:
        pass
sys.exit(any(name in sys.modules for name in ("torch", "diffusers", "transformers", "numpy")))
"""


def test_help_and_version_import_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HEAVY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    assert f"diffusers-graft {dg.__version__}" in done.stdout


def test_a_copy_beside_no_package_finds_the_version(tmp_path):
    """An editable install copies the parser away from the package."""
    copy = tmp_path / "diffusers_graft_cli.py"
    copy.write_text((ROOT / "diffusers_graft_cli.py").read_text())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, copy, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"diffusers-graft {dg.__version__}\n"
