"""`diffusers-graft <verb>`: thin, one function a verb."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .._version import __version__
from ..errors import FileError, GraftError


def say(text: str) -> None:
    """A line for the person at the terminal."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_quickstart(arguments: argparse.Namespace) -> None:
    """Graft the testbed model end to end."""
    from ..operators import parse_operator
    from ..testbed.quickstart import quickstart

    quickstart(parse_operator(arguments.operator), arguments.sites, arguments.output, seed=arguments.seed, say=say)


def run_operators(arguments: argparse.Namespace) -> None:
    """List every operator: what it replaces, its cost at a shape, its start, its paper."""
    from ..evaluation.operator_costs import list_operators

    list_operators(tokens=arguments.tokens, width=arguments.width, heads=arguments.heads, say=say)


def run_sites(arguments: argparse.Namespace) -> None:
    """List the sites of a model: a folder or repository, or the testbed."""
    from .. import testbed
    from ..inspection import find_sites

    say(
        str(
            find_sites(
                testbed.load() if arguments.model is None else _pretrained(arguments.model, arguments.subfolder)
            )
        )
    )


def _pretrained(source: str, subfolder: str | None):
    from diffusers import AutoModel

    try:
        return AutoModel.from_pretrained(source, subfolder=subfolder)
    except Exception as error:  # whatever diffusers trips over in files of another kind
        reason = str(error).partition("\n")[0]
        raise FileError(
            f"There is no model of diffusers in {source}: {reason} Give a folder that save_pretrained wrote, "
            "or a Hub repository user/name; of a pipeline, --subfolder transformer."
        ) from error


def build_parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="diffusers-graft", description="Edit the architecture of diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    quickstart = verbs.add_parser("quickstart", help=run_quickstart.__doc__)
    quickstart.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder for the graft and its pictures"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="of data, noise and random starts")

    quickstart.add_argument("--operator", default="neighborhood", help="operator, such as hyena_x(kernel_size=4)")
    quickstart.add_argument("--sites", default="self_attention[1::2]", help="rule key of the sites to graft")
    quickstart.set_defaults(run=run_quickstart)

    operators = verbs.add_parser("operators", help=run_operators.__doc__)
    operators.add_argument("--tokens", type=int, default=1024, help="of the shape costs are measured at; a square")
    operators.add_argument("--width", type=int, default=384, help="of the model")
    operators.add_argument("--heads", type=int, default=6, help="of its attention")
    operators.set_defaults(run=run_operators)

    sites = verbs.add_parser("sites", help=run_sites.__doc__)
    sites.add_argument("model", nargs="?", help="folder or Hub repository of a transformer; the testbed unless given")
    sites.add_argument("--subfolder", help="of a pipeline, such as transformer")
    sites.set_defaults(run=run_sites)

    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a verb; a refusal is one line on stderr and exit status 2, an interruption 130."""
    return run_verb(build_parser().parse_args(argv))


def run_verb(arguments: argparse.Namespace) -> int:
    """Run the function that a parser chose and return its exit status."""
    try:
        arguments.run(arguments)
    except (GraftError, OSError) as error:  # OSError: an output that cannot be written
        sys.stderr.write(f"diffusers-graft: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ndiffusers-graft: interrupted. What was saved before is unchanged.\n")
        return 130
    return 0
