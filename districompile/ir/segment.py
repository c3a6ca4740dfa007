# SPDX-License-Identifier: Apache-2.0
"""The graph of one segment for one rank, of which a backend builds an engine."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from torch import fx

from districompile.ir.spec import TensorSpec


class InnerCollective(NamedTuple):
    """A collective that an engine computes itself, in place of its output ``sent`` and its input ``received``.

    Both are flat. Of an ``all_gather``, every rank receives what all ranks send, in rank order. For an ``all_to_all``,
    a rank sends one block to each rank, all of one size, and receives one from each, in rank order.
    """

    sent: str
    received: str
    ranks: int
    op: Literal["all_gather", "all_to_all"] = "all_gather"


@dataclasses.dataclass(frozen=True)
class SegmentGraph:
    """The input of a backend's build. Nothing may change it afterwards.

    The placeholders of ``graph`` are ``inputs``, then ``weights``, in order. Its output is a flat tuple, one tensor for
    each of ``outputs``. Every node has ``meta["val"]``. Weights have their names in the weight file, inputs and outputs
    the names of their values.

    ``collectives`` are pairs of an output and an input that the engine connects itself, in the order in which all ranks
    compute them, so that it has neither as an input or output of its own. Only some backends can (see
    ``collectives_inside``).
    """

    name: str
    graph: fx.GraphModule
    inputs: tuple[tuple[str, TensorSpec], ...]
    weights: tuple[tuple[str, TensorSpec], ...]
    outputs: tuple[tuple[str, TensorSpec], ...]
    collectives: tuple[InnerCollective, ...] = ()
