"""All rules that ship with the package: importing this module registers them."""

from districompile.passes.rules import attention, linear, movement, norm, pieces, pointwise, reduction, resize, shape, window

FAMILIES = (attention, linear, movement, norm, pieces, pointwise, reduction, resize, shape, window)
