"""What a file may ask for follows from its size."""

import threading

import pytest
import torch
from torch import nn

import diffusers_graft as dg
from diffusers_graft.errors import FileError, OperatorError
from diffusers_graft.inspection import find_sites
from diffusers_graft.planning.plan import build_operator
from diffusers_graft.serialization.limits import Budget, building_within, check_work, first_line

from ..models import tiny_dit

SMALL = Budget(bytes=1000, parts=10)


def test_the_budget_is_ten_bytes_a_byte_of_the_file_and_64_mib():
    budget = Budget.of({"a": torch.zeros(100, dtype=torch.float32), "b": torch.zeros(10, dtype=torch.int8)})
    assert budget == Budget(bytes=10 * 410 + 64 * 2**20, parts=4 * 2 + 4096)


def build_forever(built):
    with building_within(SMALL, "it"):
        for _ in range(10**9):
            built.append(nn.Sequential(nn.Identity()))


def test_building_stops_at_the_first_part_too_many():
    built = []
    with pytest.raises(FileError, match="it asks for more than 10 parts"):
        build_forever(built)
    assert len(built) == 10


def register(kind):
    with building_within(SMALL, "it"):
        tensor = torch.empty(10**12)
        if kind == "parameter":
            nn.Module().register_parameter("table", nn.Parameter(tensor))
        else:
            nn.Module().register_buffer("table", tensor)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_building_stops_before_memory_is_taken(kind):
    with pytest.raises(FileError, match="more than 1,000 bytes"):
        register(kind)


def test_other_threads_build_as_they_like():
    with building_within(SMALL, "it"):
        thread = threading.Thread(target=lambda: nn.Sequential(*[nn.Identity() for _ in range(100)]))
        thread.start()
        thread.join()


@pytest.mark.parametrize("error", [ZeroDivisionError("no heads"), RuntimeError("size"), KeyError("x")])
def test_whatever_goes_wrong_in_building_is_told_in_words(error):
    with pytest.raises(FileError, match=f"it cannot be built: {type(error).__name__}"), building_within(SMALL, "it"):
        raise error


def test_errors_of_ours_pass_as_they_are():
    with pytest.raises(OperatorError, match="as it is"), building_within(SMALL, "it"):
        raise OperatorError("as it is")


def test_afterwards_nothing_is_counted():
    with building_within(SMALL, "it"):
        pass
    nn.Sequential(*[nn.Identity() for _ in range(100)])


@pytest.mark.parametrize("name", dg.operators.available())
def test_every_operator_as_it_is_keeps_within_the_limits(name):
    owner = dg.operators.get(name)
    for site in find_sites(tiny_dit(num_layers=2), blocks=True):
        if site.kind in owner.kinds and not site.kind.startswith("block"):
            with building_within(Budget.of({}), name):
                operator = build_operator(owner.Config().resolved(site), site)
            check_work(operator, name)


DEAR = [("feed_forward", "gated_mlp", {"expansion": 10**5}), ("feed_forward", "mlp", {"expansion": 10**5})]


@pytest.mark.parametrize(("kind", "name", "settings"), DEAR)
def test_an_operator_that_costs_a_thousand_blocks_is_refused(kind, name, settings):
    site = find_sites(tiny_dit(num_layers=1)).where(kind=kind)[0]
    with torch.device("meta"):
        operator = dg.operators.get(name).Config(**settings).resolved(site).build(site)
    with pytest.raises(FileError, match="times a transformer block"):
        check_work(operator, name)


def test_the_first_line_of_an_error_is_short():
    assert first_line(ValueError("first\nsecond")) == "ValueError: first"
    assert len(first_line(ValueError("x" * 9999))) < 250
