"""Extensions of districompile. Importing the package registers operators and rules: it is the entry point
``districompile.extensions`` in ``pyproject.toml``."""

from __future__ import annotations

from districompile_example import operators, sharpen

__all__ = ["operators", "sharpen"]
