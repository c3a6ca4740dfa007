"""What the product is compared with: plain implementations that compute the same, without planned memory.

:mod:`.executor` runs the steps of a plan in whatever memory is free, over transports that pack messages
(:mod:`.packing`, :mod:`.transports`). :mod:`.runner` runs all ranks of it in turn. :mod:`.joined` computes a phase with
its collectives inside.
"""
