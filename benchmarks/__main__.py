"""Measurements of the authors: `python -m benchmarks <name>` from a checkout; none of it is in the wheel."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffusers_graft.cli.main import run_verb, say


def run_ablate(arguments: argparse.Namespace) -> None:
    """What each start and each stage buys, at equal compute, and the paper's recipe beside ours."""
    from .ablate import Ablation, ablate

    settings = {name: getattr(arguments, name) for name in ("operator", "sites", "steps", "seeds")}
    ablate(Ablation(**settings), arguments.output, say=say)


def run_bench(arguments: argparse.Namespace) -> None:
    """Forward latency of the original and of grafts, alternating, as ratios."""
    from .models import bench_models

    bench_models(
        arguments.output, arguments.operators.split(","), sizes=arguments.sizes, rounds=arguments.rounds, say=say
    )


def run_bench_operators(arguments: argparse.Namespace) -> None:
    """Every operator by itself on CPU: time against softmax, share of a free mixer's speed-up, memory."""
    from .operators import bench_operators

    bench_operators(arguments.output, rounds=arguments.rounds, only=arguments.only, say=say)


def run_bench_pixart(arguments: argparse.Namespace) -> None:
    """PixArt-Sigma at 2,048 x 2,048 on one CUDA device: what grafts save of a forward."""
    from .pixart import bench_pixart

    bench_pixart(arguments.output, rounds=arguments.rounds, say=say)


def run_bench_training(arguments: argparse.Namespace) -> None:
    """Stage one against the least it could cost, and what reusing the teacher's passes saves."""
    from .training import bench_training

    bench_training(arguments.output, rounds=arguments.rounds, say=say)


def run_bench_depth(arguments: argparse.Namespace) -> None:
    """Half the depth on the testbed: pairs side by side, blocks removed, and a model trained from scratch."""
    from .depth import bench_depth

    bench_depth(arguments.output, say=say)


def run_bench_planner(arguments: argparse.Namespace) -> None:
    """Plans under a budget of FLOPs on the testbed, against one operator at interleaved sites and against chance."""
    from .planner import bench_planner

    bench_planner(arguments.output, say=say)


def run_families(arguments: argparse.Namespace) -> None:
    """What works in which transformer class of diffusers, measured on tiny models, as Markdown."""
    import diffusers

    from .families import measure_families
    from .family_tables import full_table, short_table

    rows = measure_families()
    say((full_table if arguments.full else short_table)(rows, diffusers.__version__))


def side(text: str) -> int:
    """A side of latents. Raises argparse's error for one without room for a patch."""
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"latents are 2 wide or more, a patch; got {number}")
    return number


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all measurements and their options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure operators, grafts and training."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="name")
    ablate = verbs.add_parser("ablate", help=run_ablate.__doc__)
    ablate.add_argument("--steps", type=int, default=50, help="of stage two that every run may cost")
    ablate.add_argument("--seeds", type=int, default=3, help="that every row is run with")
    ablate.add_argument(
        "--output", type=Path, default=Path("ablation"), help="folder; rows that are there are not run again"
    )
    ablate.add_argument("--operator", default="neighborhood", help="operator, such as hyena_x(kernel_size=4)")
    ablate.add_argument("--sites", default="self_attention[1::2]", help="rule key of the sites to graft")
    ablate.set_defaults(run=run_ablate)

    families = verbs.add_parser("families", help=run_families.__doc__)
    families.add_argument("--markdown", action="store_true", help="print Markdown, as without this")
    families.add_argument("--full", action="store_true", help="a line a class, as in examples/benchmarks/families.md")
    families.set_defaults(run=run_families)

    bench = verbs.add_parser("models", help=run_bench.__doc__)
    bench.add_argument(
        "--operators",
        default="neighborhood,sliding_window,linear_attention,hyena_x",
        help="names with commas between them",
    )
    bench.add_argument(
        "--sizes", type=side, nargs="+", default=[16, 32, 64, 128], help="sides of the latents (2 x 2 patches)"
    )
    bench.add_argument("--rounds", type=int, default=7, help="measured, of each in turns; 2 or more")
    bench.add_argument("--output", type=Path, help="Markdown file to store the table in")
    bench.set_defaults(run=run_bench)

    for name, run in {"depth": run_bench_depth, "planner": run_bench_planner}.items():
        verb = verbs.add_parser(name, help=run.__doc__)
        verb.add_argument(
            "--output", type=Path, default=Path(name), help="folder; rows that are there are not run again"
        )
        verb.set_defaults(run=run)

    for name, run in {
        "operators": run_bench_operators,
        "pixart": run_bench_pixart,
        "training": run_bench_training,
    }.items():
        verb = verbs.add_parser(name, help=run.__doc__)
        verb.add_argument("--output", type=Path, help="Markdown file to store the tables in")
        verb.add_argument("--rounds", type=int, default=7, help="measured, of each in turns; 2 or more")
        if name == "operators":
            verb.add_argument(
                "--only", default="", help='tables whose titles begin so, as in "Compiled|Image and text"'
            )
        verb.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(run_verb(build_parser().parse_args()))
