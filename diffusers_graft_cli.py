"""The command `diffusers-graft`: its options, and nothing heavy.

It lies beside the package, since importing anything of that imports torch and diffusers, which takes seconds that
`--help` and `--version` need not take. The verbs themselves are in diffusers_graft/cli/verbs.py.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="diffusers-graft", description="Edit the architecture of diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    quickstart = verbs.add_parser("quickstart", help="graft the testbed model end to end")
    quickstart.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder for the graft and its pictures"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="of data, noise and random starts")
    quickstart.add_argument("--operator", default="neighborhood", help="operator, such as hyena_x(kernel_size=4)")
    quickstart.add_argument("--sites", default="self_attention[1::2]", help="rule key of the sites to graft")

    operators = verbs.add_parser("operators", help="list every operator: the part it replaces, its cost, its paper")
    operators.add_argument("--tokens", type=int, default=1024, help="of the shape costs are measured at; a square")
    operators.add_argument("--width", type=int, default=384, help="of the model")
    operators.add_argument("--heads", type=int, default=6, help="of its attention")

    sites = verbs.add_parser("sites", help="list the sites of a model")
    sites.add_argument(
        "model",
        nargs="?",
        default="testbed:letters",
        help="folder or Hub repository of a transformer, or testbed:letters or testbed:scenes; the first unless given",
    )
    sites.add_argument("--subfolder", help="of a pipeline, such as transformer")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; a refusal is one line on stderr and exit status 2, an interruption 130."""
    arguments = build_parser().parse_args(argv)
    # imported when the options are known to be right: this takes seconds
    from diffusers_graft.cli import verbs

    return verbs.run(getattr(verbs, arguments.verb), arguments, program="diffusers-graft")


def _version() -> str:
    version = runpy.run_path(str(Path(__file__).parent / "diffusers_graft" / "_version.py"))
    return version["__version__"]


if __name__ == "__main__":
    sys.exit(main())
