"""The verbs of the command line, one thin function each; their options are in diffusers_graft_cli.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import cast

from diffusers import AutoModel, ModelMixin

from .. import testbed
from ..errors import FileError, GraftError
from ..evaluation.operator_costs import list_operators
from ..inspection import find_sites
from ..operators import parse_operator
from ..testbed import quickstart as letters


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(verb: Callable[[argparse.Namespace], None], arguments: argparse.Namespace, *, program: str) -> int:
    """Run a verb and return its exit status: 2 for a refusal, 130 for an interruption, each a line on stderr."""
    try:
        verb(arguments)
    # OSError: an output that cannot be written
    except (GraftError, OSError) as error:
        sys.stderr.write(f"{program}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: interrupted. What was saved before is unchanged.\n")
        return 130
    return 0


def quickstart(arguments: argparse.Namespace) -> None:
    """Graft the testbed model end to end."""
    operator = parse_operator(arguments.operator)
    letters.quickstart(operator, arguments.sites, arguments.output, seed=arguments.seed, say=say)


def operators(arguments: argparse.Namespace) -> None:
    """List every operator with its cost at a shape."""
    list_operators(tokens=arguments.tokens, width=arguments.width, heads=arguments.heads, say=say)


def sites(arguments: argparse.Namespace) -> None:
    """List the sites of a model: a folder, a repository, or a testbed."""
    say(str(find_sites(_load_model(arguments.model, arguments.subfolder))))


def _load_model(source: str, subfolder: str | None) -> ModelMixin:
    """Load a testbed, a folder or a repository. Raises `FileError` where there is no model of diffusers."""
    if source.startswith("testbed:"):
        return testbed.load_named(source)
    try:
        # its annotation allows for pipelines, which it never reads
        return cast(ModelMixin, AutoModel.from_pretrained(source, subfolder=subfolder))
    # diffusers fails in many ways over files of another kind
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise FileError(
            f"There is no model of diffusers in {source}: {reason} Give a folder that save_pretrained wrote, "
            "or a Hub repository user/name; of a pipeline, --subfolder transformer."
        ) from error
