"""Measure how densely a Python package is written: `python -m benchmarks.density [FOLDER ...]`.

Dense code is short and slow to read. The table counts, per 1,000 lines, what a reader has to unpack: several
assignments in one statement, conditional expressions, assignments inside expressions, comprehensions inside
comprehensions. It also gives the share of lines with a comment and the median number of syntax nodes of a simple
statement.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SIMPLE_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
TOOL_COMMENTS = ("noqa", "type:", "pyright:", "fmt:")


@dataclass
class Density:
    """Counts over the files of one package."""

    lines: int = 0
    packed_assignments: int = 0
    conditional_expressions: int = 0
    walrus: int = 0
    nested_comprehensions: int = 0
    comments: int = 0
    statement_sizes: list[int] = field(default_factory=list)

    def add(self, source: str) -> None:
        """Count one file."""
        self.lines += source.count("\n")
        for node in ast.walk(ast.parse(source)):
            self.packed_assignments += is_packed_assignment(node)
            self.conditional_expressions += isinstance(node, ast.IfExp)
            self.walrus += isinstance(node, ast.NamedExpr)
            self.nested_comprehensions += is_nested_comprehension(node)
            if isinstance(node, SIMPLE_STATEMENTS) and not is_docstring(node):
                self.statement_sizes.append(count_nodes(node))
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                # A directive for a tool tells the reader nothing.
                self.comments += not any(word in token.string for word in TOOL_COMMENTS)

    def rates(self) -> dict[str, float]:
        """Return the figures by name: per 1,000 lines, comments in percent, nodes as a median."""
        thousands = max(self.lines, 1) / 1000
        return {
            "packed assignments": self.packed_assignments / thousands,
            "conditional expressions": self.conditional_expressions / thousands,
            "walrus": self.walrus / thousands,
            "nested comprehensions": self.nested_comprehensions / thousands,
            "comments, %": 100 * self.comments / max(self.lines, 1),
            "nodes a statement": statistics.median(self.statement_sizes or [0]),
        }


def is_packed_assignment(node: ast.AST) -> bool:
    """Tell whether a node is `a, b = x, y`."""
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def is_nested_comprehension(node: ast.AST) -> bool:
    """Tell whether a node is a comprehension with another one inside."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    return any(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node) if inner is not node)


def is_docstring(node: ast.AST) -> bool:
    """Tell whether a statement is a lone constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def count_nodes(statement: ast.AST) -> int:
    """Return the number of syntax nodes of a statement, without load and store marks."""
    return sum(not isinstance(node, ast.expr_context) for node in ast.walk(statement))


def measure(paths: Iterable[Path]) -> Density:
    """Return the density of Python files."""
    density = Density()
    for path in paths:
        density.add(path.read_text(encoding="utf-8"))
    return density


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("diffusers_graft")])
    for folder in parser.parse_args().folders:
        density = measure(sorted(folder.rglob("*.py")))
        sys.stdout.write(f"{folder}: {density.lines} lines\n")
        for name, rate in density.rates().items():
            sys.stdout.write(f"  {name:24} {rate:6.1f}\n")


if __name__ == "__main__":
    main()
