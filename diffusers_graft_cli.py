"""The command `diffusers-graft`: its options, and nothing heavy.

It lies beside the package, since importing anything of that imports torch and diffusers, which takes seconds that
`--help` and `--version` need not take. The verbs themselves are in diffusers_graft/cli/verbs.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_RECIPE = """\
keys of a recipe, each an option as well (--finetune.steps 500), after its name:
  model      name, revision, subfolder, dtype, scheduler, config; or the name
             alone: testbed:letters, a folder, a Hub repository
  plan       rules such as {self_attention[50%]: hyena_x}, or a plan.json
  search     candidates and a budget, in place of a plan
  data       synthetic, folder, dataset, webdataset or latents; batch_size
  distill    stage one: steps, lr, loss and all of dg.DistillConfig
  finetune   stage two: steps, lr, lora and all of dg.FinetuneConfig
  evaluate   metrics          benchmark  sizes, rounds
  samples    prompts, every   share      repository, private, license
  report, seed, output
--keys lists every key with its meaning."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="diffusers-graft", description="Edit the architecture of diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    _add_whole_ways(verbs)
    _add_recipe_verbs(verbs)
    _add_model_verbs(verbs)
    _add_sharing_verbs(verbs)
    _add_operator_verbs(verbs)
    return parser


def _add(verbs: Any, name: str, words: str, example: str) -> argparse.ArgumentParser:
    """Add a verb with what its help says and shows."""
    return verbs.add_parser(
        name,
        help=words,
        description=textwrap.fill(f"{words[:1].upper()}{words[1:]}.", 80),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A shortened option would be taken for a key of a recipe, and the other way round.
        allow_abbrev=False,
    )


def _add_whole_ways(verbs: Any) -> None:
    train = _add(
        verbs,
        "train",
        "run a recipe: plan, both stages, scores, report, sharing; goes on where it stopped",
        f"diffusers-graft train recipe.yaml --finetune.steps 500\n\n{_RECIPE}",
    )
    _add_recipe(train, stages=True)
    train.add_argument("--keys", action="store_true", help="list every key of a recipe, and do nothing else")
    quickstart = _add(
        verbs,
        "quickstart",
        "graft the testbed model end to end",
        "diffusers-graft quickstart --operator 'hyena_x(layout=\"2d\")'",
    )
    quickstart.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder for the graft and its pictures"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="of data, noise and random starts")
    quickstart.add_argument("--operator", default="neighborhood", help="operator, such as hyena_x(kernel_size=4)")
    quickstart.add_argument("--sites", default="self_attention[1::2]", help="rule key of the sites to graft")


def _add_recipe_verbs(verbs: Any) -> None:
    stages = {
        "distill": "run a recipe up to the end of stage one",
        "finetune": "run a recipe up to the end of stage two",
        "evaluate": "measure the original and the graft of a recipe, trained first where it is not",
        "benchmark": "measure time and memory of a recipe's graft, trained first where it is not",
    }
    for name, words in stages.items():
        _add_recipe(_add(verbs, name, words, f"diffusers-graft {name} recipe.yaml"), stages=True)
    analyze = _add(
        verbs,
        "analyze",
        "measure locality, activations and redundancy of a recipe's model, for the choice of sites",
        "diffusers-graft analyze recipe.yaml",
    )
    _add_recipe(analyze)
    search = _add(
        verbs,
        "search",
        "survey a recipe's candidates and solve for its budget; or solve a saved survey for another",
        "diffusers-graft search recipe.yaml\n"
        "  diffusers-graft search graft/survey.json --search.flops 0.8 --save plan.json",
    )
    _add_recipe(search)
    search.add_argument("--save", type=Path, help="file for the plan; plan.json in the output of a recipe as well")


def _add_recipe(verb: argparse.ArgumentParser, *, stages: bool = False) -> None:
    verb.add_argument("recipe", nargs="?", type=Path, help="YAML file; options after it set its keys")
    _add_json(verb)
    if stages:
        verb.add_argument(
            "--dry-run",
            action="store_true",
            help="print sites, plan, parameters, FLOPs, memory, disk and downloads, and do nothing else",
        )
        verb.add_argument("--devices", type=int, default=1, help="of the dry run, which divides weights among them")


def _add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_model_verbs(verbs: Any) -> None:
    sites = _add(verbs, "sites", "list the sites of a model", "diffusers-graft sites testbed:letters")
    _add_model(sites, nargs="?", default="testbed:letters")
    plan = _add(
        verbs,
        "plan",
        "resolve rules against a model, and print or save the plan",
        "diffusers-graft plan testbed:letters 'self_attention[50%]=hyena_x'",
    )
    _add_model(plan)
    plan.add_argument("rules", help="rules with semicolons between them, or the path of a plan.json to check")
    plan.add_argument("--save", type=Path, help="file for the plan")


def _add_model(verb: argparse.ArgumentParser, **settings: Any) -> None:
    verb.add_argument(
        "model",
        help="folder or Hub repository of a transformer or its pipeline, or testbed:letters or testbed:scenes",
        **settings,
    )
    verb.add_argument("--subfolder", help="of a transformer")
    verb.add_argument("--revision", help="branch, tag or commit of a repository")
    _add_json(verb)


def _add_sharing_verbs(verbs: Any) -> None:
    report = _add(verbs, "report", "write report.html of a run's folder", "diffusers-graft report graft")
    report.add_argument("folder", type=Path, help="output folder of a run")
    card = _add(verbs, "card", "print the card of a saved graft", "diffusers-graft card graft")
    card.add_argument("folder", type=Path, help="of a saved graft")
    push = _add(
        verbs, "push", "push a saved graft and its card to the Hub", "diffusers-graft push graft me/my-graft --private"
    )
    push.add_argument("folder", type=Path, help="of a saved graft")
    push.add_argument("repository", help="user/name on the Hub")
    push.add_argument("--private", action="store_true", help="hide a new repository from others")
    push.add_argument("--revision", help="branch to push to")
    pull = _add(verbs, "pull", "download a graft from the Hub into a folder", "diffusers-graft pull me/my-graft graft")
    pull.add_argument("repository", help="user/name on the Hub")
    pull.add_argument("folder", type=Path, help="for the graft; new or empty")
    pull.add_argument("--revision", help="branch, tag or commit")
    upstream = _add(
        verbs,
        "import",
        "read a checkpoint released with the paper, and save it as a grafted model",
        "diffusers-graft import grafting/dit-xl2-mha-hyena_x-50p-fid2.74 hyena-dit",
    )
    upstream.add_argument("source", help="a model.pt, or the Hub repository that holds it")
    upstream.add_argument("folder", type=Path, help="for the model")
    upstream.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged, or the last ones")
    upstream.add_argument("--license", help="of the weights, an id of the Hub")


def _add_operator_verbs(verbs: Any) -> None:
    operators = _add(
        verbs,
        "operators",
        "list every operator: the part it replaces, its cost, its paper",
        "diffusers-graft operators --tokens 4096",
    )
    operators.add_argument("--tokens", type=int, default=1024, help="of the shape costs are measured at; a square")
    operators.add_argument("--width", type=int, default=384, help="of the model")
    operators.add_argument("--heads", type=int, default=6, help="of its attention")
    _add_json(operators)
    check = _add(
        verbs,
        "check",
        "run the conformance suite on an operator, by name or in a file; exit status 1 where it fails",
        "diffusers-graft check token_roll.py",
    )
    check.add_argument("operator", help="a Python file with one operator, or text such as hyena_x(kernel_size=4)")
    _add_json(check)
    new = _add(
        verbs,
        "new-operator",
        "write the skeleton of an operator, which passes check",
        "diffusers-graft new-operator token_roll",
    )
    new.add_argument("name", help="of the operator, and of its file")
    new.add_argument("--kind", choices=("mixer", "feed_forward"), default="mixer", help="what it replaces")
    reproduce = _add(
        verbs,
        "reproduce",
        "run the paper's tables at the scale of the letters, row by row",
        "diffusers-graft reproduce --tables self_graft layers",
    )
    reproduce.add_argument("--tables", nargs="+", help="some of the tables; all unless given")
    reproduce.add_argument("--seeds", type=int, default=1, help="runs of each row")
    reproduce.add_argument(
        "--output", type=Path, default=Path("reproduce"), help="folder; rows there are not run again"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit status: 2 for a refusal, 130 for an interruption, each a line on stderr."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not hasattr(arguments, "recipe"):
        parser.error(f"{arguments.verb} takes no {' '.join(rest)}")
    arguments.overrides = rest
    try:
        # imported when the options are known to be right: this takes seconds
        from diffusers_graft.cli import verbs

        return verbs.run(verbs.VERBS[arguments.verb], arguments, program=parser.prog)
    except KeyboardInterrupt:
        # before the verb began
        sys.stderr.write(f"\n{parser.prog}: interrupted.\n")
        return 130


def _version() -> str:
    # Found and not imported; not beside this file, which an editable install copies.
    package = importlib.util.find_spec("diffusers_graft")
    assert package is not None
    assert package.origin is not None
    version = runpy.run_path(str(Path(package.origin).with_name("_version.py")))
    return version["__version__"]


if __name__ == "__main__":
    sys.exit(main())
