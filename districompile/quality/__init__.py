"""How good the pictures of N ranks are, measured against those of one device from the same prompts and seeds.

:mod:`cases` says what is drawn, :mod:`draw` draws it with a diffusers pipeline, :mod:`metrics` compares,
:mod:`measure` does this for several ways of computing in one run, :mod:`page` shows the result, and :mod:`floor` looks
for the fastest setting that is good enough.
"""

from __future__ import annotations
