"""Others' formulations compute what our operators do, each by its own code."""

from functools import partial

import pytest
import torch

from benchmarks import operators as bench
from benchmarks import peers
from diffusers_graft.core.context import Grid


@pytest.fixture
def eager(monkeypatch):
    """Compiling takes longer than all else here."""
    monkeypatch.setattr(peers, "compiled", lambda call: call)


def test_every_peer_gives_our_outputs_and_gradients(eager):
    pytest.importorskip("local_attention")
    names = []
    grid = Grid(height=16, width=32)
    # A share of 0.1 of so few blocks is one, and one block leaves nothing to weigh.
    more = peers._block_sparse("block_sparse(block=4, keep=3)", grid, 2, 8)
    for contest in (*peers.make_contests(grid, heads=2, head_width=8), more):
        inputs = [part.double().requires_grad_() for part in contest.inputs]
        expected = contest.ours(*inputs)
        weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(0))
        wanted = torch.autograd.grad((expected * weight).sum(), inputs)
        for name, call in contest.peers.items():
            names.append(name)
            plain = [part.detach() for part in inputs]
            torch.testing.assert_close(call(*plain), expected.detach(), rtol=1e-5, atol=1e-5)
            if name in contest.forward_only:
                continue
            got = torch.autograd.grad((call(*inputs) * weight).sum(), inputs)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert len(names) == 16


def test_a_peer_that_is_faster_is_named_so():
    assert bench.beside_ours(0.5, 1.0) == "0.50 x, faster"
    assert bench.beside_ours(2.0, 1.0) == "2.00 x"


def test_a_benchmark_that_was_stopped_measures_each_table_once(monkeypatch, tmp_path):
    output = tmp_path / "operators.md"
    measured = []

    def measure(title):
        measured.append(title)
        if measured == ["one", "two"]:
            raise KeyboardInterrupt
        return [["operator", "ms"], [title, "1.0"]]

    tables = {title: partial(measure, title) for title in ("one", "two")}
    monkeypatch.setattr(bench, "_parts", lambda rounds, side, heads: iter(tables.items()))
    with pytest.raises(KeyboardInterrupt):
        bench.bench_operators(output, rounds=2, say=lambda text: None)
    bench.bench_operators(output, rounds=2, say=lambda text: None)
    assert measured == ["one", "two", "two"]
    assert "one       1.0" in output.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["operators.md"]
