"""The code of the guides runs as it is written, with numbers of steps made small."""

import ast
import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest
import yaml

import diffusers_graft as dg
from diffusers_graft.recipes.reading import load_recipe
from diffusers_graft_cli import build_parser

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([DOCS / "index.md", *(DOCS / "guides").glob("*.md")])
BLOCK = re.compile(r"^(<!-- not run: [^\n]*-->\n)?```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STEPS = re.compile(r"\b(steps|num_inference_steps)=\d+")


def blocks_of(page):
    """(language, words after it, code, whether it runs) of every block of a page, in order."""
    for skipped, language, words, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        yield language, words.strip(), code, not skipped


def run(code, names):
    exec(compile(STEPS.sub(r"\1=2", code), "<guide>", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_guide_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}  # an operator of a script has the name of its class
    failure = None
    for language, words, code, runs in blocks_of(page):
        if language == "text":
            # What stands there is the message of the error above it.
            assert failure is not None, "a message without the code that raises it"
            assert " ".join(code.split()) in " ".join(str(failure).split())
            failure = None
        elif language == "python" and not runs:
            ast.parse(code)
        elif language == "python" and words == 'title="refused"':
            with pytest.raises(dg.GraftError) as caught:
                run(code, names)
            failure = caught.value
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                run(code, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_recipes_of_a_guide_are_read(page, tmp_path):
    for language, _, code, _ in blocks_of(page):
        if language == "console":
            for line in code.splitlines():
                program, *arguments = re.findall(r'"[^"]*"|\S+', line)
                if program == "diffusers-graft":
                    # Keys of recipes are options, too, which the verbs read themselves.
                    build_parser().parse_known_args([argument.strip('"') for argument in arguments])
        if language == "yaml":
            path = tmp_path / "recipe.yaml"
            path.write_text(code, encoding="utf-8")
            assert load_recipe(path).output == yaml.safe_load(code)["output"]


def test_the_reference_has_every_public_name():
    reference = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: diffusers_graft(?:\.\w+)*\.(\w+)$", reference, re.MULTILINE))
    rooms = {"data", "hub", "operators", "metrics"}  # pages of their own
    assert set(dg.__all__) - {"__version__"} - rooms <= documented


def test_every_page_is_in_the_navigation():
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"hub_library.md"}
    assert pages == set(re.findall(r"^ +- (\S+\.md)$", text, re.MULTILINE))


def test_the_reference_lists_every_operator():
    pytest.importorskip("griffe")  # of the extra `docs`
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    text = hooks["on_page_markdown"]((DOCS / "reference" / "operators.md").read_text(encoding="utf-8"))
    listed = re.findall(r"^::: diffusers_graft\.operators\.(\w+)\n    options", text, re.MULTILINE)
    assert listed == list(dg.operators.available())
    assert hooks["on_page_markdown"]("another page") == "another page"
    assert hooks["frame_examples"]("One.\n\n>>> a\n1\n\nTwo.") == "One.\n\n```pycon\n>>> a\n1\n```\n\nTwo."
