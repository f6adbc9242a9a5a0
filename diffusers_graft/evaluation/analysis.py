"""What an analysis found, as one value: it prints, draws, and is saved as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ..core.storage import read_json, write_json
from ..core.tables import Table, Tabular
from ..errors import FileError
from .plots import draw_analysis

FORMAT = 1

# A value for each timestep bucket; None for one that no sample was in.
PerBucket = Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class SiteLocality:
    """Shares of one attention's mass near the query.

    Attributes:
        site, path: address and module path.
        band: share within the raster band (L_k), for each bucket a list of heads.
        neighborhood: share within the window of the grid, for each bucket a list of heads.
        others: share of all mass on tokens that are not the image's, for each bucket.
        uniform_band, uniform_neighborhood: the shares if attention were uniform.
    """

    site: str
    path: str
    band: PerBucket
    neighborhood: PerBucket
    others: PerBucket
    uniform_band: float
    uniform_neighborhood: float


@dataclass(frozen=True, kw_only=True)
class SiteActivations:
    """Statistics of what one attention or feed-forward returns.

    Attributes:
        site, path: address and module path.
        buckets: for each bucket a dict: `count` of values, `mean`, `variance`, `kurtosis` (3 for a normal
            distribution), and `largest`, pairs of an absolute value and its channel, largest first.
    """

    site: str
    path: str
    buckets: PerBucket


@dataclass(frozen=True, kw_only=True)
class BlockRedundancy:
    """Redundancy of one block; see `diffusers_graft.evaluation.redundancy`.

    Attributes:
        path: of the block.
        similarity: cosine of tokens before and after it, for each bucket.
        linear_error: error of the best linear map, relative to the variance of what the block adds; None where there
            were too few tokens to fit one.
    """

    path: str
    similarity: PerBucket
    linear_error: float | None


@dataclass(frozen=True, repr=False)
class Analysis(Tabular):
    """Locality, activations and redundancy of a model, by timestep bucket.

    Attributes:
        model_class: name of the diffusers class.
        bounds: edges of the buckets, as shares of the noise schedule from 0 (clean) to 1.
        samples: number in each bucket.
        localities: of the attentions that run on the image, in forward order.
        activations: of all attentions and feed-forwards, in forward order.
        blocks: in forward order.
        cka: alignment of the outputs of all pairs of blocks; empty where it was not measured.
        protocol: settings that the figures depend on.
    """

    model_class: str
    bounds: list[float]
    samples: list[int]
    localities: list[SiteLocality] = field(default_factory=list)
    activations: list[SiteActivations] = field(default_factory=list)
    blocks: list[BlockRedundancy] = field(default_factory=list)
    cka: list[list[float]] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def locality(self) -> dict[str, float]:
        """L_k by the address of a site: mean over samples, timesteps and heads. `dg.top_local` reads it."""
        return {row.site: self.mean(row.band) for row in self.localities}

    def mean(self, values: PerBucket) -> float:
        """Return the mean over samples, and over heads where there are several, of a value for each bucket."""
        total = 0.0
        for value, count in zip(values, self.samples, strict=True):
            # Buckets without samples weigh nothing.
            if value is not None:
                heads = value if isinstance(value, list) else [value]
                total += count * sum(heads) / len(heads)
        return total / sum(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return the analysis JSON-able; `from_dict` reads it back."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Analysis:
        """Read what `to_dict` wrote. Raises `FileError` for other data, or for a newer format."""
        try:
            if data["format"] > FORMAT:
                raise FileError(f"This analysis has format {data['format']}; this version reads up to {FORMAT}.")
            rows = {name: value for name, value in data.items() if name != "format"}
            # Files name the fields of each row, so an entry that is missing or unknown is found here.
            rows["localities"] = [SiteLocality(**row) for row in rows["localities"]]
            rows["activations"] = [SiteActivations(**row) for row in rows["activations"]]
            rows["blocks"] = [BlockRedundancy(**row) for row in rows["blocks"]]
            return cls(**rows)
        except (KeyError, TypeError, AttributeError) as error:
            raise FileError(f"This is not an analysis: {error!r}. One is what Analysis.save wrote.") from error

    def save(self, path: str | Path) -> None:
        """Write the analysis as JSON. Raises `FileError` for a path that cannot be written."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Analysis:
        """Read an analysis. Raises `FileError` for a file that is missing or no analysis."""
        return cls.from_dict(read_json(path))

    def draw(self, path: str | Path | IO[bytes]) -> None:
        """Draw locality and variance by depth, and the alignment of blocks. Raises what `new_figure` does."""
        shares = {}
        if self.localities:
            band = f"band, |i - j| <= {self.protocol.get('band')}"
            window = f"window, {self.protocol.get('kernel')} x {self.protocol.get('kernel')}"
            shares[band] = (
                [_mean_heads(zip(row.band, self.samples, strict=True)) for row in self.localities],
                [row.uniform_band for row in self.localities],
            )
            shares[window] = (
                [_mean_heads(zip(row.neighborhood, self.samples, strict=True)) for row in self.localities],
                [row.uniform_neighborhood for row in self.localities],
            )
        variances: dict[str, list[float]] = {}
        for row in self.activations:
            # Variances of attentions and feed-forwards differ by more than they grow with depth.
            kind = row.site.partition("[")[0]
            variances.setdefault(kind, []).append(self.mean(_pick(row.buckets, "variance")))
        draw_analysis(path, shares, variances, self.cka)

    def to_table(self) -> Table:
        """Return the table that `str` shows: sites in forward order, then blocks."""
        localities = {row.site: row for row in self.localities}
        heading = ("part", "path", "band", "window", "others", "variance", "kurtosis", "largest")
        heading = (*heading, "similarity", "linear error", "CKA to next")
        rows = []
        for row in self.activations:
            cells = ["", "", ""]
            near = localities.get(row.site)
            if near is not None:
                shares = (near.band, near.neighborhood, near.others)
                cells = [f"{self.mean(share):.2f}" for share in shares]
            variance = self.mean(_pick(row.buckets, "variance"))
            kurtosis = self.mean(_pick(row.buckets, "kurtosis"))
            largest = max(bucket["largest"][0][0] for bucket in row.buckets if bucket is not None)
            figures = (f"{variance:.3g}", f"{kurtosis:.1f}", f"{largest:.3g}")
            rows.append((row.site, row.path, *cells, *figures, "", "", ""))
        for number, block in enumerate(self.blocks):
            error = "" if block.linear_error is None else f"{block.linear_error:.2f}"
            alignment = ""
            if self.cka and number + 1 < len(self.blocks):
                alignment = f"{self.cka[number][number + 1]:.3f}"
            # Blocks share the table with the sites inside them, in columns of their own.
            blanks = [""] * 6
            similarity = f"{self.mean(block.similarity):.3f}"
            rows.append((f"block[{number}]", block.path, *blanks, similarity, error, alignment))
        return Table(rows, heading=heading, numbers=range(2, len(heading)), is_ruled=True, notes=self._notes())

    def _notes(self) -> list[str]:
        notes = [f"{sum(self.samples)} samples in {len(self.samples)} timestep buckets."]
        # The share of uniform attention depends on the size alone, so one stands for all.
        if self.localities:
            first = self.localities[0]
            band = self.protocol.get("band")
            kernel = self.protocol.get("kernel")
            notes.append(
                f"Band: attention mass within |i - j| <= {band} (uniform attention {first.uniform_band:.2f}); "
                f"window: within {kernel} x {kernel} tokens ({first.uniform_neighborhood:.2f}); others: on tokens "
                "that are not the image's."
            )
        return notes

    def __repr__(self) -> str:
        return f"Analysis({self.model_class})\n{self}"


def _pick(buckets: PerBucket, name: str) -> list[float | None]:
    return [None if bucket is None else bucket[name] for bucket in buckets]


def _mean_heads(by_bucket: Iterable[tuple[list[float] | None, int]]) -> list[float]:
    """Return the mean over samples for every head."""
    # Means within a bucket are weighed by its samples, as if there were one bucket.
    seen = [(heads, count) for heads, count in by_bucket if heads is not None]
    total = sum(count for _, count in seen)
    columns = zip(*(heads for heads, _ in seen), strict=True)
    counts = [count for _, count in seen]
    return [sum(value * count for value, count in zip(column, counts, strict=True)) / total for column in columns]
