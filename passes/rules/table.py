# SPDX-License-Identifier: Apache-2.0
"""All rules that ship with the package. An import of this module registers them."""

from districompile.passes.rules import (
    attention,
    dimwise,
    linear,
    movement,
    norm,
    pieces,
    pointwise,
    pool,
    quantised,
    reduction,
    resize,
    sampling,
    scan,
    shape,
    window,
)

FAMILIES = (
    attention, dimwise, linear, movement, norm, pieces, pointwise, pool, quantised, reduction, resize, sampling, scan,
    shape, window,
)  # fmt: skip
