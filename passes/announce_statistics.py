"""Give what a rank sends of its norm statistics a node of its own.

The exact phase sends the statistics themselves. The displaced phase sends a forecast of the next step's in their place
(see ``group-norm-mode``). Both phases must call what they send by one name, so this pass runs before they part.

    %m = dc.moments(%x, 2)                            %m = dc.moments(%x, 2)
    %g = dc.fetch(%m, 0, [0, 1, 2], ..., 'norm')  ->  %s = dc.announce(%m)
                                                      %g = dc.fetch(%s, 0, [0, 1, 2], ..., 'norm')
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from districompile.cutter import Cutter
from districompile.ir.layout import Factor
from districompile.ir.ops import ops
from districompile.unit import Stage, Unit


@dataclasses.dataclass(frozen=True)
class AnnounceStatistics:
    """Requires the local stage with its collectives marked. Changes displaced fetches of ``moments`` alone."""

    name: ClassVar[str] = "announce-statistics"
    exact: ClassVar[bool] = True
    needs: ClassVar[Stage] = "local"
    gives: ClassVar[Stage] = "local"

    def run(self, unit: Unit) -> None:
        emitter = Cutter(unit.graph, unit.fractions, unit.captured.fake_mode)
        for fetch in [n for n in unit.graph.nodes if n.target is ops.fetch.default and n.meta.get("displaced")]:
            moments = fetch.args[0]
            if moments.target is not ops.moments.default:
                continue
            emitter.target = fetch
            with unit.graph.inserting_before(fetch):
                announced = emitter.emit(ops.announce.default, moments, name=f"{moments.name}_announced")
            announced.meta["layout"] = moments.meta["layout"].with_dim(1, (Factor(4),))
            fetch.replace_input_with(moments, announced)
