"""Sites: the replaceable parts of a model, as pure data.

A site can be written to JSON, compared, and sent to somebody who has no model at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, get_type_hints, overload

from ..errors import FileError, UnknownNameError
from .tables import Table, Tabular

ATTENTION_KINDS = ("self_attention", "cross_attention", "joint_attention")
BLOCK_KINDS = ("block_pair", "block", "block_run")
# No tensor of torch has a longer side on every device.
_LARGEST_SIZE = 2**31 - 1

KINDS = (*ATTENTION_KINDS, "feed_forward", *BLOCK_KINDS)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A replaceable part of a model, with the sizes that an operator builds itself from.

    `Site(kind=..., ...)` makes one of the class that belongs to the kind: `AttentionSite`, `FeedForwardSite` or
    `BlockSite`.

    Attributes:
        kind: one of `KINDS`.
        index: position among the model's sites of this kind, in forward order.
        path: dotted module path inside the model.
        width: features of a token that enters and leaves the part (D).
    """

    kinds: ClassVar[tuple[str, ...]] = ()

    kind: str
    index: int
    path: str
    width: int

    # As pathlib.Path does: the base class makes an instance of the subclass that fits.
    def __new__(cls, *, kind: str = "", **sizes: Any) -> Site:
        # Copying makes instances without arguments.
        if cls is Site and kind:
            return object.__new__(_class_of(kind))
        return object.__new__(cls)

    def __post_init__(self):
        if self.kind not in self.kinds:
            raise UnknownNameError("kind", self.kind, self.kinds)

    @property
    def address(self) -> str:
        """Rule key that names this site alone: `self_attention[3]`."""
        return f"{self.kind}[{self.index}]"

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all modules that it replaces."""
        return (self.path,)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of the site, JSON-able; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Site:
        """Read what `to_dict` wrote.

        Raises `FileError` for entries that such a site does not have, lacks, or has of another type, and
        `UnknownNameError` for an unknown kind.
        """
        site_class = _class_of(data["kind"])
        types = _types_of(site_class)
        unknown = sorted(set(data) - set(types))
        if unknown:
            raise FileError(f"A site has the unknown entries {unknown}; it was written by a newer diffusers-graft.")
        wrong = [name for name, kind in types.items() if type(data.get(name)) is not kind]
        if wrong:
            raise FileError(
                f"A site lacks entries, or has them of another type than they are written with: {', '.join(wrong)}."
            )
        # Sizes come from untrusted files, too, and operators are built from them.
        large = [name for name, kind in types.items() if kind is int and not 0 <= data[name] <= _LARGEST_SIZE]
        if large:
            raise FileError(f"A site has sizes that no model has: {', '.join(large)}.")
        return site_class(**data)


@dataclass(frozen=True, kw_only=True)
class AttentionSite(Site):
    """An attention.

    Attributes:
        heads: number of heads (H).
        head_width: features of a head (E).
    """

    kinds = ATTENTION_KINDS

    heads: int
    head_width: int

    @property
    def inner_width(self) -> int:
        """Width of queries, keys and values together (H * E)."""
        return self.heads * self.head_width


@dataclass(frozen=True, kw_only=True)
class FeedForwardSite(Site):
    """A feed-forward.

    Attributes:
        hidden: neurons between the two linear layers.
        activation: diffusers' name of the activation, as in `activation_fn="gelu-approximate"`.
    """

    kinds = ("feed_forward",)

    hidden: int
    activation: str


@dataclass(frozen=True, kw_only=True)
class BlockSite(Site):
    """A block, or neighbouring ones.

    Attributes:
        blocks: how many neighbours the site spans, the first of them at `path`.
        streams: how many streams they carry on: one, or image and prompt.
    """

    kinds = BLOCK_KINDS

    blocks: int
    streams: int

    @property
    def address(self) -> str:
        """Rule key that names this site alone: `block[3]`, `block_run[2:4]`."""
        if self.kind == "block_run":
            return f"block_run[{self.index}:{self.index + self.blocks}]"
        return super().address

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all modules that it replaces: the first block and those behind it."""
        holder, _, number = self.path.rpartition(".")
        return (self.path, *(f"{holder}.{int(number) + step}" for step in range(1, self.blocks)))


def _class_of(kind: str) -> type[Site]:
    for site_class in (AttentionSite, FeedForwardSite, BlockSite):
        if kind in site_class.kinds:
            return site_class
    raise UnknownNameError("kind", kind, KINDS)


@functools.cache
def _types_of(site_class: type[Site]) -> dict[str, type]:
    hints = get_type_hints(site_class)
    # Class variables are among the fields that a dataclass notes.
    return {name: hints[name] for name in site_class.__dataclass_fields__ if name != "kinds"}


class Sites(Tabular, Sequence[Site]):
    """An immutable sequence of sites; `str(sites)` is a table.

    Attributes:
        notes: sentences on parts that were found and are no sites; they follow the table.
    """

    def __init__(self, sites: Iterable[Site] = (), notes: Iterable[str] = ()):
        self._sites = tuple(sites)
        self.notes = tuple(notes)

    @overload
    def __getitem__(self, index: int) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> Sites: ...

    def __getitem__(self, index: int | slice) -> Site | Sites:
        if isinstance(index, slice):
            return Sites(self._sites[index])
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sites) and self._sites == other._sites

    def __hash__(self) -> int:
        return hash(self._sites)

    def where(self, *, kind: str) -> Sites:
        """Return the sites of one kind, in forward order. Raises `UnknownNameError` for an unknown kind."""
        if kind not in KINDS:
            raise UnknownNameError("kind", kind, KINDS)
        return Sites(site for site in self if site.kind == kind)

    def to_table(self) -> Table:
        """Return the table that `str` shows."""
        rows: list[tuple[str, ...]] = []
        for site in self:
            heads = hidden = ""
            if isinstance(site, AttentionSite):
                heads = f"{site.heads} x {site.head_width}"
            elif isinstance(site, FeedForwardSite):
                hidden = str(site.hidden)
            rows.append((site.address, site.path, str(site.width), heads, hidden))
        return Table(rows, heading=("site", "path", "width", "heads", "hidden"), notes=self.notes)

    def __repr__(self) -> str:
        return f"Sites({len(self)})\n{self}"
