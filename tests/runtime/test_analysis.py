"""When transfers start, and what they have to hide under."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import districompile as dc
from districompile.ir.ops import ops
from districompile.plan.cuts import _last_cut
from districompile.plan.plan import Run, Start
from districompile.runtime.executor.analysis import phase_needs
from tests.helpers_net import make_program
from tests.small_models import captured


def test_what_is_waited_for_at_once() -> None:
    plan = make_program(2).plan
    needs = phase_needs(plan)
    posts = {name: [n for n, s in enumerate(p.steps) if isinstance(s, Start)] for name, p in plan.phases.items()}
    assert needs["exact"].exposed == set(posts["exact"])  # each is waited for before the next engine
    beside = set(posts["displaced"]) - needs["displaced"].exposed
    assert beside and needs["displaced"].exposed  # the output is gathered at the end
    for n in needs["displaced"].exposed:
        assert not any(isinstance(s, Run) for s in plan.phases["displaced"].steps[n:])
    assert needs["exact"].waited_in_call == set(posts["exact"])
    assert len(needs["displaced"].waited_in_call) == 1  # the next call finds the rest
    assert needs["displaced"].overlapped and not needs["exact"].overlapped
    assert needs["exact"].received == () and needs["displaced"].received
    assert needs["exact"].inputs == needs["displaced"].inputs == ("sample", "timestep")


def test_inputs_that_only_the_exact_phase_reads() -> None:
    program = dc.convert(captured("sdxl", 1, 20, 8), ranks=2, optimise="cache-conditioning")
    needs = phase_needs(program.plan)
    assert "encoder_hidden_states" in needs["exact"].inputs
    assert "encoder_hidden_states" not in needs["displaced"].inputs


@dataclasses.dataclass
class Sends:
    """A collective, as far as it matters here."""

    nbytes: int
    displaced: bool = True
    specs: tuple[int, ...] = (0, 1)

    def sent_bytes(self, rank: int) -> int:
        return self.nbytes if rank else 0


@pytest.mark.parametrize(
    "flops, sent, begins",
    [
        ([100] * 8, {}, 4),  # at its turn
        ([100] * 8, {6: 1000}, 4),  # 100 operations hide a tenth of a byte: nothing is gained by waiting
        ([1e6] * 8, {6: 1000}, 7),  # after what sends much
        ([1e6] * 8, {6: 1000, 7: 9000}, 7),  # the last result has nothing to hide under wherever it is sent
        ([1e5] * 8, {3: 300, 5: 2}, 4),  # two bytes are less than a hundredth
        ([1e5] * 8, {2: 400, 5: 300}, 4),  # later, less work would be left to hide all that is sent before
        ([1e6] * 8, {2: 400, 5: 300}, 6),
    ],
)
def test_where_the_last_segment_begins(flops: list[float], sent: dict[int, int], begins: int) -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    work = {}
    for i, n in enumerate(flops):
        node = graph.call_function(torch.relu, (node,))
        work[node] = n
        if i in sent:
            graph.call_function(ops.exchange.default, (node, [1])).meta["collective"] = Sends(sent[i])
    last = _last_cut(work, 2)
    assert last is not None and list(work).index(last) + 1 == begins
