"""The named pipelines: literal lists, in order."""

from __future__ import annotations

from typing import Any

from districompile.passes.annotate import Annotate
from districompile.passes.announce_statistics import AnnounceStatistics
from districompile.passes.choose_displaced import ChooseDisplaced
from districompile.passes.drop_noops import DropNoOps
from districompile.passes.explicit_casts import ExplicitCasts
from districompile.passes.group_norm_mode import GroupNormMode
from districompile.passes.hoist_conditioning import HoistConditioning
from districompile.passes.hoist_fetches import HoistFetches
from districompile.passes.leave_room import LeaveRoom
from districompile.passes.localise import Localise
from districompile.passes.lower_collectives import LowerCollectives
from districompile.passes.merge_linears import MergeLinears
from districompile.passes.share_subexpressions import ShareSubexpressions
from districompile.passmanager import Pass
from districompile.unit import OPTIMISATIONS, Options

PASSES: dict[str, type[Any]] = {
    p.name: p
    for p in (
        DropNoOps, ExplicitCasts, ShareSubexpressions, MergeLinears, Annotate, Localise, HoistFetches, LeaveRoom,
        ChooseDisplaced, AnnounceStatistics, LowerCollectives, GroupNormMode, HoistConditioning,
    )
}  # fmt: skip


def cut(options: Options) -> list[Pass]:
    """From the captured graph to the local graph with its collectives marked. Both phases share it. Optimisations are
    exact; they run where the user asks for them."""
    passes: list[Pass] = [
        DropNoOps(),
        ExplicitCasts(),
        ShareSubexpressions(),
        MergeLinears(),
        Annotate(),
        Localise(),
        HoistFetches(),
        LeaveRoom(),
        ChooseDisplaced(kinds=options.displace, groupnorm=options.groupnorm),
    ]
    if options.groupnorm == "forecast":
        passes.append(AnnounceStatistics())
    return [p for p in passes if p.name not in OPTIMISATIONS or p.name in options.optimise]


def lower(options: Options) -> list[Pass]:
    """From the local graph, as the user's own passes left it, to the lowered graph."""
    return [LowerCollectives()]


def steady(options: Options) -> list[Pass]:
    """What the displaced phase does on top. The warm-up phase is the lowered graph as it is."""
    passes: list[Pass] = []
    if options.groupnorm in ("forecast", "corrected_async", "local"):
        passes.append(GroupNormMode(mode=options.groupnorm))
    if HoistConditioning.name in options.optimise:
        passes.append(HoistConditioning())
    return passes
