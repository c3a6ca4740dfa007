"""Transports give what the plan says, whichever way the bytes travel, and gloo gives the same bits as lockstep."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from districompile.errors import TransportError
from districompile.ir.spec import TensorSpec
from districompile.plan.plan import Collective, Exchange, Reduction, RowSlice
from districompile.runtime.transports.gloo import new_group
from districompile.runtime.transports.messages import Message, combine
from tests.reference.packing import Packing
from tests.reference.transports import DynamicGroup, PackedGloo

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float64)
Values = list[dict[str, torch.Tensor]]  # by rank


def random_case(seed: int, ranks: int) -> tuple[list[Collective], Values]:
    """Random exchanges and reductions of one post, with the value that each rank contributes."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    collectives: list[Collective] = []
    values: Values = [{} for _ in range(ranks)]
    for i in range(rng.randint(1, 4)):
        dtype = rng.choice(DTYPES)
        if rng.random() < 0.35:
            dtype = rng.choice((torch.float32, torch.float16, torch.int64))
            spec = TensorSpec(rng.choice([(), (3,), (2, 5)]), dtype)
            collectives.append(
                Reduction(f"c{i}", f"site{i}", "norm", f"v{i}", rng.choice(["sum", "max", "min"]), (spec,) * ranks)
            )
            specs: tuple[TensorSpec, ...] = (spec,) * ranks
        else:
            exchange = random_exchange(rng, i, ranks, dtype)
            collectives.append(exchange)
            specs = exchange.specs
        for r in range(ranks):
            values[r][f"v{i}"] = (torch.randn(specs[r].shape) * 3).to(dtype)
    return collectives, values


def random_exchange(rng: random.Random, i: int, ranks: int, dtype: torch.dtype) -> Exchange:
    shape = [rng.randint(1, 3) for _ in range(rng.randint(1, 4))]
    dim = rng.randrange(len(shape))
    owned = [rng.randint(0, 4) for _ in range(ranks)]
    wanted = [rng.randint(0, 8) for _ in range(ranks)]
    pieces = []
    for dst in range(ranks):
        at = rng.randint(0, 2)
        while True:
            src = rng.randrange(ranks)
            rows = min(rng.randint(0, 3), owned[src], wanted[dst] - at)
            if rows < 0 or at >= wanted[dst]:
                break
            pieces.append(RowSlice(src, dst, rng.randint(0, owned[src] - rows), at, rows))
            at += rows + rng.randint(0, 1)
    rng.shuffle(pieces)

    def spec(rows: int) -> TensorSpec:
        return TensorSpec((*shape[:dim], rows, *shape[dim + 1 :]), dtype)

    return Exchange(
        f"c{i}", f"site{i}", "conv", f"v{i}", dim, tuple(map(spec, owned)), tuple(map(spec, wanted)), tuple(pieces),
        float(rng.randint(0, 1)), "general",
    )  # fmt: skip


def expected(collectives: list[Collective], values: Values, rank: int) -> dict[str, torch.Tensor]:
    """What the plan means, computed without any packing."""
    results = {}
    for c in collectives:
        if isinstance(c, Reduction):
            results[c.name] = combine(c.op, [v[c.source] for v in values])
            continue
        result = torch.full(c.results[rank].shape, c.fill, dtype=c.results[rank].dtype)
        for p in c.pieces:
            if p.dst == rank:
                sent = torch.arange(p.start, p.start + p.rows)
                rows = values[p.src][c.source].index_select(c.dim, sent)
                result.index_copy_(c.dim, torch.arange(p.at, p.at + p.rows), rows)
        results[c.name] = result
    return results


def lockstep(collectives: list[Collective], values: Values) -> Values:
    group = DynamicGroup(len(values))
    pending = [t.post(collectives, v) for t, v in zip(group.transports, values, strict=True)]
    results = [p.wait() for p in pending]
    assert not group.mail
    return results


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_lockstep_equals_the_plan(seed: int, ranks: int) -> None:
    collectives, values = random_case(seed, ranks)
    for rank, got in enumerate(lockstep(collectives, values)):
        assert_same(got, expected(collectives, values, rank))


def test_values_may_change_after_post() -> None:
    spec = TensorSpec((2, 3), torch.float32)
    c = Exchange(
        "c", "s", "conv", "x", 0, (spec,) * 2, (spec,) * 2,
        tuple(RowSlice(src, dst, 0, src, 1) for src in (0, 1) for dst in (0, 1)), 0.0, "general",
    )  # fmt: skip
    s = Reduction("r", "s", "norm", "x", "sum", (spec,) * 2)
    group = DynamicGroup(2)
    values = [{"x": torch.full((2, 3), float(r + 1))} for r in range(2)]
    pending = [t.post([c, s], v) for t, v in zip(group.transports, values, strict=True)]
    for v in values:
        v["x"].fill_(-1)
    for p in pending:
        assert p.wait()["c"].tolist() == [[1.0] * 3, [2.0] * 3]
        assert p.wait()["r"].tolist() == [[3.0] * 3] * 2


def test_sums_of_halves_are_rounded_once() -> None:
    parts = [torch.tensor([2048.0], dtype=torch.float16)] + [torch.tensor([1.0], dtype=torch.float16)] * 2
    assert combine("sum", parts).item() == 2050.0 and combine("sum", parts).dtype == torch.float16


def test_everything_to_one_rank_is_one_message() -> None:
    spec = TensorSpec((3,), torch.float32)
    many = [Reduction(f"r{i}", "s", "norm", f"v{i}", "sum", (spec,) * 2) for i in range(100)]
    packing = Packing(many, 0, 2)
    assert list(packing.outgoing) == [1] and isinstance(packing.outgoing[1], Message)
    assert len(packing.outgoing[1].slots) == 100


def test_nothing_is_sent_where_nothing_is_wanted() -> None:
    spec = TensorSpec((2,), torch.float32)
    own = Exchange("c", "s", "conv", "x", 0, (spec,) * 3, (spec,) * 3, (RowSlice(0, 0, 0, 0, 2),), 7.0, "none")
    packing = Packing([own], 1, 3)
    assert not packing.outgoing and not packing.incoming
    assert lockstep([own], [{"x": torch.ones(2)}] * 3)[1]["c"].tolist() == [7.0, 7.0]


def test_a_value_unlike_the_plan_is_refused() -> None:
    spec = TensorSpec((2,), torch.float32)
    c = Reduction("r", "down.norm1", "norm", "x", "sum", (spec,) * 2)
    with pytest.raises(RuntimeError, match=r"down\.norm1: x is torch.float32\(3,\) on rank 0"):
        DynamicGroup(2).transports[0].post([c], {"x": torch.ones(3)})


def test_lockstep_out_of_step_is_a_defect() -> None:
    c = Reduction("r", "s", "norm", "x", "sum", (TensorSpec((2,), torch.float32),) * 2)
    group = DynamicGroup(2)
    pending = group.transports[0].post([c], {"x": torch.ones(2)})
    with pytest.raises(RuntimeError, match="rank 0 waits for post 0 of rank 1"):
        pending.wait()


def compare_with_lockstep(transport: PackedGloo) -> None:
    rank, ranks = transport.rank, transport.ranks
    cases = [random_case(seed, ranks) for seed in range(12)]
    want = [lockstep(c, v)[rank] for c, v in cases]
    for (collectives, values), w in zip(cases, want, strict=True):
        assert_same(transport.post(collectives, values[rank]).wait(), w)
    # All at once, waited for out of order.
    pending = [transport.post(c, v[rank]) for c, v in cases]
    for p, w in reversed(list(zip(pending, want, strict=True))):
        assert_same(p.wait(), w)
        assert_same(p.wait(), w)
    for dtype in DTYPES:
        tensor = torch.full((2, 1), rank + 1).to(dtype)
        assert torch.equal(transport.broadcast(tensor), torch.full((2, 1), 1).to(dtype))
        want_all = [torch.full((2, 1), r + 1).to(dtype) for r in range(ranks)]
        assert all(map(torch.equal, transport.all_gather(tensor), want_all))
    transport.barrier()


def leave_early(transport: PackedGloo) -> None:
    """One rank ends at once, with a message it never read; the other still waits for what it was sent."""
    spec = TensorSpec((1 << 23,), torch.float32)
    c = Reduction("r", "s", "norm", "x", "sum", (spec,) * 2)
    first = transport.post([c], {"x": torch.ones(spec.shape)})
    second = transport.post([c], {"x": torch.ones(spec.shape)})
    assert first.wait()["r"][0] == 2
    if transport.rank == 0:
        second.wait()
    transport.close()
    os._exit(0)


def three_ranks(rank: int, store: Path) -> None:
    """Three ranks, then the last two of them as a group of their own; they leave without waiting for each other."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 3), rank=rank, world_size=3, timeout=limit)
    compare_with_lockstep(PackedGloo())
    pair = new_group([1, 2], 30)
    if rank != 0:
        compare_with_lockstep(PackedGloo(pair))
        leave_early(PackedGloo(pair))
    os._exit(
        0
    )  # as processes of the launcher do: once, gloo's threads were seen to abort a process that ended otherwise


@pytest.mark.multiprocess
def test_gloo_equals_lockstep_bitwise(tmp_path: Path) -> None:
    mp.spawn(three_ranks, args=(tmp_path / "store",), nprocs=3)


def lose_a_rank(rank: int, store: Path) -> None:
    c = Reduction("r", "s", "norm", "x", "sum", (TensorSpec((2,), torch.float32),) * 2)
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2, timeout=limit)
    transport = PackedGloo()
    transport.post([c], {"x": torch.ones(2)}).wait()
    transport.post([c], {"x": torch.ones(2)}).wait()
    if rank == 0:
        with pytest.raises(TransportError, match="rank 0 lost rank 1: it ended, or did not answer in time"):
            transport.post([c], {"x": torch.ones(2)}).wait()


@pytest.mark.multiprocess
def test_gloo_names_the_rank_that_is_gone(tmp_path: Path) -> None:
    mp.spawn(lose_a_rank, args=(tmp_path / "store",), nprocs=2)
