"""House rules: floors, one home for each library, short files and functions, nothing pickled, everything pinned."""

import ast
import re
import socket
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.density import Density, measure

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_graft"
FILES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# A room imports from the floors below its own, and from itself. Rooms that share a floor do not know each other.
FLOORS = [
    {"errors", "_version"},
    {"core"},
    {"operators"},
    {"inspection"},
    {"planning"},
    {"injection"},
    {"training"},
    {"evaluation", "data"},
    {"search", "cards"},
    {"serialization"},
    {"reporting"},
    {"samples", "background_push"},
    {"model_mixin", "trainer", "testbed", "hub", "search.survey"},
    {"testbed.quickstart", "recipes"},
    {"cli"},
    {"__main__"},
]

EVERYWHERE = {"torch", "tqdm"}
HOMES = {
    "diffusers": None,  # everywhere but in operators, see below
    "diffusers_graft_cli": {"cli", "__main__"},  # beside the package, so that --help imports nothing heavy
    "einops": {"operators"},
    "peft": {"training.finetune", "serialization.lora"},  # stage two injects it, the hub stores its tensors
    "accelerate": {"training"},
    "safetensors": {"core.storage", "serialization", "testbed", "training.checkpoint", "data"},
    "huggingface_hub": {"serialization", "cards", "hub"},
    "jaxtyping": {"core.shapes"},
    "jinja2": {"cards", "reporting"},
    "rich": {"core.tables"},
    "yaml": {"cards", "recipes"},
    "pydantic": {"recipes"},  # checks recipes
    "filelock": {"recipes"},
    "matplotlib": {"evaluation.plots", "testbed.sampling", "reporting.charts"},
    # renders the letters; opens pictures; writes and reads samples
    "PIL": {"testbed", "data.folders", "reporting.samples", "evaluation"},
    "datasets": {"data.folders"},
    "trackio": {"samples"},
    **dict.fromkeys(("flash_attn", "natten", "causal_conv1d", "mamba_ssm", "fla", "kernels"), {"operators"}),
    "triton": {"operators.kernels"},
    "numpy": {"evaluation"},  # npz files
    "transformers": {"evaluation"},  # networks that judge pictures
    **dict.fromkeys(("torchmetrics", "torch_fidelity", "lpips", "ImageReward", "hpsv2"), {"evaluation.metrics"}),
}
OPTIONAL = {
    "matplotlib",
    "PIL",
    "datasets",
    "trackio",
    "transformers",
    "torchmetrics",
    "torch_fidelity",
    "lpips",
    "ImageReward",
    "hpsv2",
    "flash_attn",
    "natten",
    "causal_conv1d",
    "mamba_ssm",
    "fla",
    "kernels",
}  # of an extra: imported where they are used, never with the module


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def inside(module, rooms):
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def home_of(module):
    """(floor, room) of a module: the most specific entry of FLOORS."""
    found = [(room, level) for level, rooms in enumerate(FLOORS) for room in rooms if inside(module, {room})]
    assert found, f"{module} stands on no floor: add it to FLOORS"
    room, level = max(found, key=lambda entry: len(entry[0]))
    return level, room


def is_module(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(tree, package):
    """(is ours, dotted name) of every import; ours without the package's name, as deep as there are modules.

    package: the folder the source lies in, dotted, below `diffusers_graft`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ["diffusers_graft", *package.split(".")] if package else ["diffusers_graft"]
            base = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            library, _, rest = name.partition(".")
            if library != "diffusers_graft":
                yield False, name
            elif is_module(rest):
                yield True, rest
            else:
                yield True, rest.rpartition(".")[0]


def upward(tree, module, package):
    """What a module imports although it stands above it, or beside it in another room."""
    level, room = home_of(module)
    for ours, target in imports_of(tree, package):
        if ours:
            floor, other = home_of(target) if target else (len(FLOORS), "the package itself")
            if floor > level or (floor == level and other != room):
                yield f"{module} imports {target or other}"


def homeless(tree, module, package):
    """Third-party libraries a module imports outside their home."""
    for ours, target in imports_of(tree, package):
        library = target.partition(".")[0]
        if ours or library in sys.stdlib_module_names or library in EVERYWHERE:
            continue
        if library == "diffusers":
            allowed = not inside(module, {"operators", "site", "errors"})
        else:
            allowed = library in HOMES and inside(module, HOMES[library])
        if not allowed:
            yield f"{module} imports {library}"


def calls(tree):
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def unsafe(tree, module="", package=""):
    """Whatever writes or reads pickles."""
    for ours, target in imports_of(tree, package):
        if not ours and target.partition(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
            yield f"imports {target}"
    for name, call in calls(tree):
        if name == "torch.save":
            yield "calls torch.save"
        if name == "torch.load" and not any(
            k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords
        ):
            yield "calls torch.load without weights_only=True"


def untidy(source):
    """What a reader should not meet in a file."""
    tree = ast.parse(source)
    if any(name == "print" for name, _ in calls(tree)):
        yield "print"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ExceptHandler)
            and (node.type is None or ast.unparse(node.type) == "BaseException")
            and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        ):
            yield "an except that swallows everything"
    patterns = {
        r"\b(TODO|FIXME|XXX)\b": "TODO",
        r"^\s*#\s*[-=#*]{4,}": "banner comment",
        r"^\s*except Exception:\s*$": "an except that swallows everything",
        r"raise NotImplementedError": "NotImplementedError: say what to do instead",
    }
    yield from (fault for pattern, fault in patterns.items() if re.search(pattern, source, re.MULTILINE))


def undocumented(tree):
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
            "_"
        )
        if public and node.name != "main" and not ast.get_docstring(node):
            yield node.name


def every_file(paths=FILES):
    return pytest.mark.parametrize("path", paths, ids=lambda path: dotted(path) or "__init__")


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def folder(path):
    return ".".join(path.relative_to(PACKAGE).parent.parts)


@every_file(
    [path for path in FILES if dotted(path)]
)  # the package's own __init__ gathers the public names from all floors
def test_imports_point_down(path):
    assert not list(upward(parsed(path), dotted(path), folder(path)))


def import_graph():
    """Modules and the modules they import, also inside functions and under TYPE_CHECKING."""
    graph = {}
    for path in FILES:
        module = dotted(path)
        targets = {target for ours, target in imports_of(parsed(path), folder(path)) if ours and target}
        if module:
            graph[module] = targets - {module}
    return graph


def circle_in(graph):
    """Modules that wait for each other in a graph of imports, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_two_modules_import_each_other():
    assert not circle_in(import_graph())


def test_a_circle_of_imports_is_caught():
    assert set(circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


@every_file()
def test_every_library_has_one_home(path):
    assert not list(homeless(parsed(path), dotted(path), folder(path)))


@every_file()
def test_optional_libraries_wait_until_they_are_used(path):
    top = ast.Module([node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not {target.partition(".")[0] for ours, target in imports_of(top, folder(path)) if not ours} & OPTIONAL


@every_file([path for path in FILES if not inside(dotted(path), {"operators.kernels"})])
def test_kernels_wait_until_they_are_used(path):
    top = ast.Module([node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not [target for ours, target in imports_of(top, folder(path)) if ours and "operators.kernels" in target]


@every_file()
def test_files_are_clean(path):
    assert path.name != "utils.py"
    assert not list(untidy(path.read_text(encoding="utf-8")))


@every_file()
def test_what_is_public_says_what_it_is(path):
    assert not list(undocumented(parsed(path)))


@every_file()
def test_nothing_is_pickled(path):
    assert not list(unsafe(parsed(path), dotted(path), folder(path)))


BAD_IMPORTS = [
    ("core.sites", "from ..operators import Mixer"),
    ("planning.plan", "from ..injection import graft"),
    ("planning.rules", "import diffusers_graft.injection.install"),
    ("operators.mlp", "from ..inspection import find_sites"),
    ("operators.mlp", "from .. import find_sites"),
    ("training.distill.distill", "from ...trainer import GraftTrainer"),
    ("training.batches", "from .. import trainer"),
    ("serialization.graft_folder", "from diffusers_graft.model_mixin import attach_verbs"),
    ("inspection.grids", "def f():\n    from ..injection import graft"),
    ("training.batches", "from ..evaluation import evaluate"),
    ("model_mixin", "from .testbed import load"),
]


@pytest.mark.parametrize(("module", "source"), BAD_IMPORTS)
def test_an_import_that_points_up_is_caught(module, source):
    assert list(upward(ast.parse(source), module, module.rpartition(".")[0]))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("injection.install", "import peft"),
        ("injection.install", "from peft import LoraConfig"),
        ("planning.plan", "from einops import rearrange"),
        ("operators.mlp", "from diffusers import ModelMixin"),
        ("injection.graft", "import safetensors.torch as st"),
        ("testbed.quickstart", "def f():\n    import matplotlib.pyplot"),
        ("planning.plan", "import scipy"),
    ],
)
def test_a_library_away_from_home_is_caught(module, source):
    assert list(homeless(ast.parse(source), module, module.rpartition(".")[0]))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.save(x, y)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
    ],
)
def test_a_pickle_is_caught(source):
    assert list(unsafe(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "if x: print(x)",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept BaseException:\n    pass",
        "# TODO later",
        "# ------ part two",
        "#########",
        "raise NotImplementedError",
    ],
)
def test_an_untidy_file_is_caught(source):
    assert list(untidy(source))


def test_a_swallowed_refusal_of_the_network_is_still_seen(network_attempts):
    for attempt in ("connect", "connect_ex"):
        with socket.socket() as plug, pytest.raises(ConnectionRefusedError):
            getattr(plug, attempt)(("192.0.2.1", 80))
    assert len(network_attempts) == 2
    network_attempts.clear()


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_everything_the_tests_need_is_pinned():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    extras = PROJECT["project"]["optional-dependencies"]
    requirements = [*PROJECT["project"]["dependencies"], *extras["eval"], *extras["data"], *extras["dev"]]
    assert {name_of(requirement) for requirement in requirements} - {"diffusers-graft"} <= {
        name_of(name) for name in pins
    }
    assert all(re.fullmatch(r"[\d.]+(post\d+)?", version) for version in pins.values()), "no local versions, no ranges"


def test_operators_of_other_packages_have_the_entry_point_group_to_themselves():
    assert "entry-points" not in PROJECT["project"]


def test_every_ignore_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^ignore = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
    rest = re.findall(r"^\"tests/.*$", text, re.MULTILINE)
    assert all("#" in line for line in [*block.splitlines(), *rest])


def test_importing_needs_no_extra_and_no_gpu():
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'datasets', 'flash_attn', 'scipy', 'tensorboard', 'pytest', 'hypothesis'): sys.modules[name] = None\n"
        "import diffusers_graft as dg\n"
        "assert 'neighborhood' in dg.operators.available()\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_leaves_what_is_heavy_to_those_who_use_it():
    """Beside `ModelMixin`; `python -m benchmarks imports` measures what importing costs."""
    code = (
        "import sys, diffusers\n"
        "from diffusers import ModelMixin\n"
        "before = set(sys.modules)\n"
        "import diffusers_graft\n"
        "heavy = ('peft', 'matplotlib', 'scipy', 'pydantic', 'rich', 'datasets', 'pandas', 'sklearn', 'torchvision',\n"
        "         'transformers.modeling_utils', 'diffusers.hooks', 'diffusers.models.transformers',\n"
        "         'diffusers.pipelines.pipeline_utils', 'diffusers.training_utils')\n"
        "print([name for name in heavy if name in set(sys.modules) - before])\n"
        # What was left out is extended as it is imported.
        "from diffusers import DiffusionPipeline\n"
        "from diffusers.loaders.peft import PeftAdapterMixin\n"
        "print([hasattr(verb, '__wrapped__') for verb in (DiffusionPipeline.save_pretrained, PeftAdapterMixin.fuse_lora)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "[True, True]"]


def test_the_contracts_public_names_are_there():
    import diffusers_graft as dg

    for name in dg.__all__:
        assert getattr(dg, name) is not None
    from diffusers import ModelMixin

    for verb in ("set_graft", "unset_graft", "enable_graft", "disable_graft", "save_graft", "load_graft", "graft"):
        assert hasattr(ModelMixin, verb)


def test_the_package_reads_as_easily_as_the_codebases_it_learns_from():
    """Bounds per 1,000 lines, from the densities of twelve admired codebases; `python -m benchmarks.density` prints ours."""
    rates = measure(FILES).rates()
    assert rates["packed assignments"] < 3
    assert rates["conditional expressions"] < 10
    assert rates["walrus"] < 1
    assert rates["nested comprehensions"] < 0.5
    assert rates["comments, %"] >= 3
    assert rates["nodes a statement"] <= 8


def test_density_counts_what_a_reader_unpacks():
    density = Density()
    density.add(
        "a, b = x, y\nc = 1 if a else 2  # why\nd = [[e for e in f] for f in a]\nif (g := a):\n    pass  # noqa\n"
    )
    assert density.lines == 5
    assert density.packed_assignments == 1
    assert density.conditional_expressions == 1
    assert density.walrus == 1
    assert density.nested_comprehensions == 1
    assert density.comments == 1
