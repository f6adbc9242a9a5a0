"""Commands and Python of a document, in order, and whether this checkout knows a command."""

import importlib
import re
import shlex
import textwrap
import tomllib
from argparse import ArgumentParser
from pathlib import Path

from benchmarks.__main__ import NAMES
from diffusers_graft_cli import build_parser

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("make", "diffusers-graft", "python", "pip", "pre-commit", "accelerate")


def python_of(text):
    """Blocks of Python of a document."""
    return [textwrap.dedent(code) for _, language, code in _BLOCK.findall(text) if language == "python"]


def commands_of(text):
    """Commands of a document, those in blocks and those between backquotes, as lists of words."""
    lines = [line for _, language, code in _BLOCK.findall(text) if language != "python" for line in code.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text))
    found = []
    for line in lines:
        if line.split()[:1] and line.split()[0] in _PROGRAMS:
            found.append(shlex.split(line, comments=True))
    return found


def refusal_of(words):
    """Why a command would not run in this checkout, None where it would; nothing is run that takes longer than its --help."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return next((f"no target {name}" for name in arguments if "=" not in name and name not in targets), None)
    if program == "diffusers-graft":
        # Keys of recipes are options, too, which the verbs read themselves.
        return _refusal(lambda: build_parser().parse_known_args(arguments))
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        named = [extra for word in arguments for extra in re.findall(r"^(?:diffusers-graft|\.)\[(.*)\]$", word)]
        return next(
            (f"no extra {extra}" for extra in ",".join(named).split(",") if extra and extra not in extras), None
        )
    if program == "python":
        return _refusal_of_python(arguments)
    return None


def _refusal(parse):
    try:
        parse()
    except SystemExit as error:
        return None if error.code == 0 else "the parser refuses it"
    return None


def _refusal_of_python(arguments):
    if arguments[:2] == ["-m", "pytest"]:
        paths = [word for word in arguments[2:] if not word.startswith("-")]
        return next((f"no {path}" for path in paths if not (ROOT / path).exists()), None)
    if arguments[:2] == ["-m", "benchmarks"] and len(arguments) > 2 and arguments[2] in NAMES:
        parser = ArgumentParser()
        importlib.import_module(f"benchmarks.{arguments[2]}").add_options(parser)
        return _refusal(lambda: parser.parse_args(arguments[3:]))
    if arguments[:1] == ["-m"]:
        path = ROOT.joinpath(*arguments[1].split("."))
        is_there = path.with_suffix(".py").exists() or path.is_dir()
        # NAME in capitals stands for one of those that are listed.
        return (
            None
            if is_there and arguments[2:] in ([], ["NAME"]) or arguments[1] == "benchmarks.density"
            else "no such module"
        )
    if arguments[:1] == ["-c"]:
        return _refusal_of_code(arguments[1])
    return None if arguments and (ROOT / arguments[0]).exists() else "no such script"


def _refusal_of_code(code):
    try:
        compile(code, "<command>", "exec")
    except SyntaxError as error:
        return str(error)
    return None
