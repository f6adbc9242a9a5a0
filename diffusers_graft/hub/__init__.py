"""The Hub: operators shared one by one, and grafts found by their tags."""

from ..operators.registry import read_repositories_with
from .operators import load_operator, push_operator
from .search import FoundGraft, FoundGrafts, search

__all__ = ["FoundGraft", "FoundGrafts", "push_operator", "search"]

read_repositories_with(load_operator)
