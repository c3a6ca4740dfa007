"""What the commands of :mod:`districompile.cli` do, one module each."""

from __future__ import annotations
