"""All rules that ship with the package: importing this module registers them."""

from districompile.passes.rules import (
    attention,
    dimwise,
    linear,
    movement,
    norm,
    pieces,
    pointwise,
    pool,
    reduction,
    resize,
    sampling,
    scan,
    shape,
    window,
)

FAMILIES = (
    attention, dimwise, linear, movement, norm, pieces, pointwise, pool, reduction, resize, sampling, scan, shape,
    window,
)  # fmt: skip
