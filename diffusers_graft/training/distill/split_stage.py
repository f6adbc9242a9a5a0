"""Stage one with its sites divided among processes: each trains its own, on whole batches.

For models whose new parts, with gradients and optimizers, do not fit one device: their weights are everywhere, the
rest is where they are trained. Every process runs the teacher on every batch, so this saves memory and no time of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import ModelMixin

from ...core.sites import Site
from ...errors import TrainingError
from ...injection.graft import Graft
from .. import distributed as processes
from ..batches import Batch, BatchStream, Share
from ..noised_batch import NoisedBatch, Noising
from .config import DistillConfig
from .stage import DistillStage, make_students, untied_tensors
from .student import SiteReport, Student


class SplitStage(DistillStage):
    """Stage one of the sites of this process.

    Attributes:
        owners: number of the process that trains a site, by path.

    Raises `TrainingError` for fewer sites than processes.
    """

    def __init__(
        self,
        teacher: ModelMixin,
        graft: Graft,
        sites: Sequence[Site],
        config: DistillConfig,
        losses: Mapping[str, str],
        lr_scales: Mapping[str, float],
        noising: Noising,
        stream: BatchStream,
        held_out: Sequence[Batch] | None,
    ):
        # On every process, since weights arrive there in the end.
        self.tensors = {site.path: untied_tensors(graft, site) for site in sites}
        trained = [site for site in sites if self.tensors[site.path]]
        state = processes.process_state()
        if len(trained) < state.num_processes:
            raise TrainingError(
                f"There are {len(trained)} sites with weights for {state.num_processes} processes: set "
                "split_sites=False, or launch fewer."
            )
        self.owners = {site.path: number % state.num_processes for number, site in enumerate(trained)}
        own = [site for site in trained if self.owners[site.path] == state.process_index]
        students = make_students(graft, own, config, losses, lr_scales)
        super().__init__(teacher, graft, students, config, noising, stream, held_out)

    def exchange_weights(self) -> None:
        """Give every process the weights that the others have trained."""
        for path, owner in self.owners.items():
            processes.send_from(owner, self.tensors[path])

    def gather_reports(self) -> dict[str, SiteReport]:
        """Return the reports of all sites, by address."""
        own = {path: student.report for path, student in self.students.items()}
        reports = _unite(processes.gather_values(own))
        return {reports[path].site.address: reports[path] for path in self.owners}

    @contextmanager
    def showing_result(self) -> Iterator[None]:
        self.exchange_weights()
        with super().showing_result():
            yield

    def _next_batch(self) -> Batch:
        batch = super()._next_batch()
        return processes.join_shares(batch) if isinstance(batch, Share) else batch

    def _own_inputs(self, noised: NoisedBatch) -> dict[str, Any]:
        return noised.inputs

    def _read_finite_metrics(self, students: list[Student]) -> list[list[float]]:
        failure = None
        rows: list[list[float]] = []
        try:
            with processes.computing_apart():
                rows = super()._read_finite_metrics(students)
        except TrainingError as error:
            failure = error
        # All stop together, or the others would wait for this one for ever.
        if not processes.min_over_processes(int(failure is None)):
            for student in students:
                student.drop_step()
            raise failure or TrainingError("Stage one: a loss of another process is not finite; that one says which.")
        return rows

    def evaluate_batches(self, batches: Iterable[NoisedBatch]) -> dict[str, float]:
        with processes.computing_apart():
            own = super().evaluate_batches(batches)
        rows = processes.gather_values((len(self.active_sites), own))
        count = sum(sites for sites, _ in rows)
        return {name: sum(sites * values[name] for sites, values in rows) / count for name in own}

    def metrics(self) -> dict[str, Any]:
        row = super().metrics()
        sites = _unite(processes.gather_values(row["sites"]))
        for name in ("loss", "error", "cosine"):
            row[name] = sum(site[name] for site in sites.values()) / len(sites)
        return {**row, "sites": sites}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # Only the first process writes, so the others keep what is theirs.
        students = _unite(processes.gather_at_main(state["students"]))
        # As one process would write it, so that another number of them may go on.
        return {**state, "students": students, "groups": [list(self.owners)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.groups = [list(self.students)]


def _unite(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}
