# SPDX-License-Identifier: Apache-2.0
"""Pipelines: lists of passes in order, with a user's own passes at the stage that they need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from districompile.ir.unit import OPTIMISATIONS, Options, Stage
from districompile.passes.announce_statistics import AnnounceStatistics
from districompile.passes.cache_conditioning import CacheConditioning
from districompile.passes.choose_displaced import ChooseDisplaced
from districompile.passes.cse import EliminateCommonSubexpressions
from districompile.passes.drop_noops import DropNoOps
from districompile.passes.exchange_before_norm import ExchangeBeforeNorm
from districompile.passes.explicit_casts import ExplicitCasts
from districompile.passes.fuse_norms import FuseNorms
from districompile.passes.fuse_parallel_linears import FuseParallelLinears
from districompile.passes.group_norm_mode import GroupNormMode
from districompile.passes.hoist_fetches import HoistFetches
from districompile.passes.in_place_gather import InPlaceGather
from districompile.passes.lower_collectives import LowerCollectives
from districompile.passes.manager import Pass
from districompile.passes.partition import Partition
from districompile.passes.propagate_shardings import PropagateShardings
from districompile.passes.quantise import Quantise
from districompile.passes.reuse_deep import ReuseDeep
from districompile.passes.save_reused import SaveReused
from districompile.passes.send_differences import SendDifferences
from districompile.passes.shard_tokens import ShardTokens
from districompile.passes.text import check_pass, parse_passes

PASSES: dict[str, type[Any]] = {
    p.name: p
    for p in (
        DropNoOps,
        FuseNorms,
        ExplicitCasts,
        EliminateCommonSubexpressions,
        FuseParallelLinears,
        Quantise,
        PropagateShardings,
        ShardTokens,
        Partition,
        HoistFetches,
        InPlaceGather,
        ChooseDisplaced,
        AnnounceStatistics,
        LowerCollectives,
        ExchangeBeforeNorm,
        GroupNormMode,
        CacheConditioning,
        SendDifferences,
        ReuseDeep,
        SaveReused,
    )
}


def add_passes(items: Iterable[Pass | type[Any] | str]) -> list[Pass]:
    """Construct the passes that a user adds: from objects, classes, or text (:mod:`districompile.passes.text`).

    Raise :class:`ConvertError` for one that cannot be read, imported or constructed, or that changes the stage.
    """
    found: list[Pass] = []
    for item in items:
        found += parse_passes(item, PASSES) if isinstance(item, str) else [check_pass(item)]
    return found


def cut(options: Options, added: Sequence[Pass] = ()) -> list[Pass]:
    """Return the passes from the captured graph to the SPMD graph, which both phases share.

    The last of them choose the displaced collectives. ``added`` passes run at the stage that they need: those of the
    global stage before ``propagate-shardings``, those of the SPMD stage at the end. An optimisation runs only if it is
    in ``options.optimise``.
    """
    simplify: list[Pass] = [
        DropNoOps(), FuseNorms(), ExplicitCasts(), EliminateCommonSubexpressions(), FuseParallelLinears()
    ]  # fmt: skip
    partition: list[Pass] = [
        PropagateShardings(),
        ShardTokens(),
        Partition(),
        HoistFetches(),
        InPlaceGather(),
        ChooseDisplaced(purposes=options.displace, groupnorm=options.groupnorm),
    ]
    if options.groupnorm == "forecast":
        partition.append(AnnounceStatistics())

    simplify, partition = _chosen(simplify, options), _chosen(partition, options)
    quantise: list[Pass] = [] if options.quantise == "none" else [Quantise()]
    return [*simplify, *quantise, *_at("global", added), *partition, *_at("spmd", added)]


def _chosen(passes: Sequence[Pass], options: Options) -> list[Pass]:
    wanted = set(options.optimise)
    if options.transfer_bits is not None:  # what is received is decoded first
        wanted -= {InPlaceGather.name, ExchangeBeforeNorm.name}
    return [p for p in passes if p.name not in OPTIMISATIONS or p.name in wanted]


def lower(options: Options) -> list[Pass]:
    """Return the passes from the SPMD graph to the lowered graph."""
    return _chosen([LowerCollectives(), ExchangeBeforeNorm()], options)


def exact(options: Options, added: Sequence[Pass] = ()) -> list[Pass]:
    """Return the passes of the exact phase, on the lowered graph: only those that a user adds."""
    return _at("lowered", added)


def displaced(options: Options, added: Sequence[Pass] = ()) -> list[Pass]:
    """Return the passes of the displaced phase, on the lowered graph; those that a user adds run last."""
    passes: list[Pass] = []
    if options.groupnorm in ("forecast", "corrected_async", "local"):
        passes.append(GroupNormMode(mode=options.groupnorm))
    if CacheConditioning.name in options.optimise:
        passes.append(CacheConditioning())
    if options.transfer_bits is not None:
        passes.append(SendDifferences())
    return [*passes, *_at("lowered", added)]


def reused(options: Options) -> list[Pass]:
    """Return the passes of the reused phase, on the lowered graph that the displaced phase has in the end."""
    return [ReuseDeep(level=options.reuse_level or 0)]


def saving(options: Options) -> list[Pass]:
    """Return the last passes of the exact and the displaced phase: they save what the reused phase reads."""
    return [SaveReused()] if options.reuse is not None else []


def _at(stage: Stage, passes: Sequence[Pass]) -> list[Pass]:
    return [p for p in passes if p.needs == stage]
