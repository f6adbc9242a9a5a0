"""`diffusers-graft <verb>`: thin, one function a verb."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._version import __version__
from .errors import FileError, GraftError


def say(text: str) -> None:
    """A line for the person at the terminal."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_quickstart(arguments: argparse.Namespace) -> None:
    """Graft the testbed model end to end."""
    from .plan import parse_operator
    from .quickstart import quickstart

    quickstart(parse_operator(arguments.operator), arguments.sites, arguments.output, seed=arguments.seed, say=say)


def run_ablate(arguments: argparse.Namespace) -> None:
    """What each start and each stage buys, at equal compute, and the paper's recipe beside ours."""
    from .ablate import Ablation, ablate

    settings = {name: getattr(arguments, name) for name in ("operator", "sites", "steps", "seeds")}
    ablate(Ablation(**settings), arguments.output, say=say)


def run_operators(arguments: argparse.Namespace) -> None:
    """List every operator: what it replaces, its cost at a shape, its start, its paper."""
    from .bench.operators import list_operators

    list_operators(tokens=arguments.tokens, width=arguments.width, heads=arguments.heads, say=say)


def run_sites(arguments: argparse.Namespace) -> None:
    """List the sites of a model: a folder or repository, or the testbed."""
    from . import testbed
    from .anatomy import find_sites

    say(str(find_sites(testbed.load() if arguments.model is None else _pretrained(arguments.model, arguments.subfolder))))


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


def run_bench(arguments: argparse.Namespace) -> None:
    """Forward latency of the original and of grafts, alternating, as ratios."""
    from .bench.models import bench_models

    bench_models(arguments.output, arguments.operators.split(","), sizes=arguments.sizes, rounds=arguments.rounds, say=say)


def run_bench_operators(arguments: argparse.Namespace) -> None:
    """Every operator by itself on CPU: time against softmax, share of a free mixer's speed-up, memory."""
    from .bench.operators import bench_operators

    bench_operators(arguments.output, rounds=arguments.rounds, only=arguments.only, say=say)


def run_bench_pixart(arguments: argparse.Namespace) -> None:
    """PixArt-Sigma at 2,048 x 2,048 on one CUDA device: what grafts save of a forward."""
    from .bench.pixart import bench_pixart

    bench_pixart(arguments.output, rounds=arguments.rounds, say=say)


def run_bench_training(arguments: argparse.Namespace) -> None:
    """Stage one against the least it could cost, and what reusing the teacher's passes saves."""
    from .bench.training import bench_training

    bench_training(arguments.output, rounds=arguments.rounds, say=say)


def run_bench_depth(arguments: argparse.Namespace) -> None:
    """Half the depth on the testbed: pairs side by side, blocks removed, and a model trained from scratch."""
    from .bench.depth import bench_depth

    bench_depth(arguments.output, say=say)


def run_bench_planner(arguments: argparse.Namespace) -> None:
    """Plans under a budget of FLOPs on the testbed, against one operator at interleaved sites and against chance."""
    from .bench.planner import bench_planner

    bench_planner(arguments.output, say=say)


def run_families(arguments: argparse.Namespace) -> None:
    """What works in which transformer class of diffusers, measured on tiny models, as Markdown."""
    import diffusers

    from .bench.families import measure_families
    from .bench.family_tables import full_table, short_table

    rows = measure_families()
    say((full_table if arguments.full else short_table)(rows, diffusers.__version__))


def side(text: str) -> int:
    """A side of latents. Raises argparse's error for one without room for a patch."""
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"latents are 2 wide or more, a patch; got {number}")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    parser = argparse.ArgumentParser(prog="diffusers-graft", description="Edit the architecture of diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    quickstart = verbs.add_parser("quickstart", help=run_quickstart.__doc__)
    quickstart.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for the graft and its pictures")
    quickstart.add_argument("--seed", type=int, default=0, help="of data, noise and random starts")

    ablate = verbs.add_parser("ablate", help=run_ablate.__doc__)
    ablate.add_argument("--steps", type=int, default=50, help="of stage two that every run may cost")
    ablate.add_argument("--seeds", type=int, default=3, help="that every row is run with")
    ablate.add_argument("--output", type=Path, default=Path("ablation"), help="folder; rows that are there are not run again")
    for verb, run in ((quickstart, run_quickstart), (ablate, run_ablate)):
        verb.set_defaults(run=run)
        verb.add_argument("--operator", default="neighborhood", help="operator, such as hyena_x(kernel_size=4)")
        verb.add_argument("--sites", default="self_attention[1::2]", help="rule key of the sites to graft")

    operators = verbs.add_parser("operators", help=run_operators.__doc__)
    operators.add_argument("--tokens", type=int, default=1024, help="of the shape costs are measured at; a square")
    operators.add_argument("--width", type=int, default=384, help="of the model")
    operators.add_argument("--heads", type=int, default=6, help="of its attention")
    operators.set_defaults(run=run_operators)

    sites = verbs.add_parser("sites", help=run_sites.__doc__)
    sites.add_argument("model", nargs="?", help="folder or Hub repository of a transformer; the testbed unless given")
    sites.add_argument("--subfolder", help="of a pipeline, such as transformer")
    sites.set_defaults(run=run_sites)

    families = verbs.add_parser("families", help=run_families.__doc__)
    families.add_argument("--markdown", action="store_true", help="print Markdown, as without this")
    families.add_argument("--full", action="store_true", help="a line a class, as in examples/benchmarks/families.md")
    families.set_defaults(run=run_families)

    _add_benchmarks(verbs)
    return parser


def _add_benchmarks(verbs) -> None:
    bench = verbs.add_parser("bench", help=run_bench.__doc__)
    bench.add_argument("--operators", default="neighborhood,sliding_window,linear_attention,hyena_x",
                       help="names with commas between them")  # fmt: skip
    bench.add_argument("--sizes", type=side, nargs="+", default=[16, 32, 64, 128], help="sides of the latents (2 x 2 patches)")
    bench.add_argument("--rounds", type=int, default=7, help="measured, of each in turns; 2 or more")
    bench.add_argument("--output", type=Path, help="Markdown file to store the table in")
    bench.set_defaults(run=run_bench)

    for name, run in {"depth": run_bench_depth, "planner": run_bench_planner}.items():
        verb = verbs.add_parser(f"bench-{name}", help=run.__doc__)
        verb.add_argument("--output", type=Path, default=Path(name), help="folder; rows that are there are not run again")
        verb.set_defaults(run=run)

    for name, run in {"operators": run_bench_operators, "pixart": run_bench_pixart, "training": run_bench_training}.items():
        verb = verbs.add_parser(f"bench-{name}", help=run.__doc__)
        verb.add_argument("--output", type=Path, help="Markdown file to store the tables in")
        verb.add_argument("--rounds", type=int, default=7, help="measured, of each in turns; 2 or more")
        if name == "operators":
            verb.add_argument("--only", default="", help='tables whose titles begin so, as in "Compiled|Image and text"')
        verb.set_defaults(run=run)


def main(argv: list[str] | None = None) -> int:
    """Run a verb; a refusal is one line on stderr and exit status 2, an interruption 130."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (GraftError, OSError) as error:  # OSError: an output that cannot be written
        sys.stderr.write(f"diffusers-graft: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ndiffusers-graft: interrupted. What was saved before is unchanged.\n")
        return 130
    return 0
