"""The Hub: operators shared one by one, and grafts found by their tags."""

from .operators import push_operator
from .search import FoundGraft, FoundGrafts, search

__all__ = ["FoundGraft", "FoundGrafts", "push_operator", "search"]
