"""House rules: floors, one home for each library, short files and functions."""
import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_graft"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each imports only from below, or from its own floor.
FLOORS = [
    {"errors", "_version"}, {"site"}, {"operators"}, {"anatomy", "plan", "processor"}, {"graft"}, {"surgery"},
    {"training", "analysis", "evaluation"}, {"hub"}, {"model", "training.trainer", "testbed"}, {"quickstart", "bench"}, {"cli"},
]  # fmt: skip

HOMES = {
    "einops": {"operators"}, "peft": {"training", "hub.adapters"}, "safetensors": {"hub.files", "testbed"},
    "huggingface_hub": {"hub"}, "matplotlib": {"evaluation.report", "testbed.sampling"}, "PIL": {"testbed"},
    "jinja2": {"hub.cards"}, "yaml": {"hub.cards"},
}  # fmt: skip


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def floor_of(module):
    for level, names in reversed(list(enumerate(FLOORS))):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return level
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS")


def imports_of(path):
    """Absolute dotted names; those of this package without its name."""
    here = dotted(path).split(".") if path.name != "__init__.py" else [*dotted(path).split("."), "__init__"]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (("out", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield "out", node.module
                continue
            base = here[: len(here) - node.level]
            for alias in node.names:
                target = ".".join([*base, *([node.module] if node.module else [])])
                yield "in", target or (alias.name if alias.name.islower() else "model")


@pytest.mark.parametrize("path", [path for path in FILES if dotted(path)], ids=dotted)
def test_imports_point_down(path):
    module = dotted(path)
    for where, target in imports_of(path):
        if where == "in" and path.name != "__init__.py":
            assert floor_of(target) <= floor_of(module), f"{module} imports {target}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_every_library_has_one_home(path):
    module = dotted(path)
    for where, target in imports_of(path):
        library = target.partition(".")[0]
        if where == "out" and library in HOMES:
            assert any(module == home or module.startswith(f"{home}.") for home in HOMES[library]), f"{module} imports {library}"


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{dotted(path)}.{node.name}", node


def test_functions_are_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert not {name: length for name, length in lengths.items() if length > 40}
    assert statistics.median(lengths.values()) < 10


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_files_are_short_and_clean(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    assert path.name != "utils.py"
    for pattern in (r"^\s*print\(", r"\bTODO\b|\bFIXME\b|\bXXX\b", r"^\s*except( Exception)?:\s*$", r"^\s*# ?[-=#*]{4,}",
                    r"^\s*import pickle", r"raise NotImplementedError"):  # fmt: skip
        assert not re.search(pattern, text, re.MULTILINE), pattern


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_what_is_public_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module says nothing"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), f"{node.name} says nothing"


def test_loading_is_never_unpickling():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(keyword.arg == "weights_only" for keyword in node.keywords), dotted(path)


def test_importing_needs_no_extra_and_no_gpu():
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'PIL', 'flash_attn', 'scipy', 'tensorboard'): sys.modules[name] = None\n"
        "import diffusers_graft as dg\n"
        "assert 'neighborhood' in dg.operators.available()\n"
    )
    if subprocess.run([sys.executable, "-c", "import sys; sys.modules['PIL'] = None; import diffusers"], capture_output=True).returncode:
        code = code.replace("'PIL', ", "")  # diffusers itself needs it
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_contracts_public_names_are_there():
    import diffusers_graft as dg

    for name in dg.__all__:
        assert getattr(dg, name) is not None
    from diffusers import ModelMixin

    for verb in ("set_graft", "unset_graft", "enable_graft", "disable_graft", "save_graft", "load_graft", "graft"):
        assert hasattr(ModelMixin, verb)
