# SPDX-License-Identifier: Apache-2.0
"""Measure the quality of pictures of N ranks against those of one device from the same prompts and seeds.

:mod:`cases` chooses the pictures, :mod:`draw` draws them with a diffusers pipeline, and :mod:`metrics` compares two
pictures. :mod:`measure` does this for several ways of computing. :mod:`page` writes a page, and :mod:`floor` searches
for the cheapest conversion options that are good enough.
"""

from __future__ import annotations
