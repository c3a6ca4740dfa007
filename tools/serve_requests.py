# SPDX-License-Identifier: Apache-2.0
"""Requests to ``districompile serve`` as hypothesis makes them, right and wrong, for ``soak_serve.py`` and tests.

Needs hypothesis.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from districompile.serve.api import EditRequest, GenerationRequest

WORDS = st.sampled_from([
    "", " ", "a star", "auto", "64x48", "0x0", "99999x99999", "url", "b64_json", "png", "webp", "toy", "style", "true",
    "../../x", "\u0000", "\ud800", "\u202e", "a" * 40_000, "NaN", "-1", "1e9",
])  # fmt: skip
NUMBERS = st.sampled_from([0, 1, 2, 3, 10, 100, -1, 2**31, 2**63, 2**64, 10**30, 0.5, 1.5, -0.0, 1e308, float("nan")])
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=5)
ANY = st.recursive(LEAVES, lambda x: st.lists(x, max_size=2) | st.dictionaries(WORDS, x, max_size=2), max_leaves=4)
FIELDS = sorted({*GenerationRequest.model_fields, *EditRequest.model_fields, "other"})
GOOD: dict[str, Any] = {"prompt": "a star", "steps": 2, "n": 1}
BODIES = st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=4)
BYTES = st.binary(max_size=60) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace"))
FORM_WORDS = WORDS.filter(lambda t: t.isprintable() or not t) | st.text("0123456789.-", max_size=4)
HEADERS = st.sampled_from(["host", "origin", "x-request-id", "content-type", "authorization"])
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12)
PATHS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="?#"), max_size=12)
