# SPDX-License-Identifier: Apache-2.0
"""Build all segments of a conversion: equal segments are built once, whatever rank or phase they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from districompile.backends.base import Backend
from districompile.bundle.weights import WeightFile
from districompile.errors import BackendError, BundleError
from districompile.ir.segment import SegmentGraph
from districompile.ir.serialize import content_hash, graph_to_json

K = TypeVar("K", bound=Hashable)


def segment_hash(backend: Backend, segment: SegmentGraph) -> str:
    """Return the name of an engine: a hash of its graph, its names, and the backend with its version.

    The names are those of inputs, outputs and weights.
    """
    names = [[name for name, _ in group] for group in (segment.inputs, segment.weights, segment.outputs)]
    return content_hash(
        json.dumps([backend.name, backend.version, names, graph_to_json(segment.graph), segment.collectives])
    )


def build_segments(
    backend: Backend,
    segments: Iterable[tuple[K, SegmentGraph]],
    weights: WeightFile,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    known: Collection[str] = (),
) -> dict[K, str]:
    """Build every segment into ``folder``, and return each key's engine file name, ``<hash><suffix>``.

    Equal segments share a file. Files that are ``known`` are there already, elsewhere, and not built. ``progress`` is
    called with the number of distinct segments built so far, and of all of them. Raise
    :class:`BackendError` with every reason if the backend cannot build an operator, before the first engine is built.
    """
    files: dict[K, str] = {}
    distinct: dict[str, SegmentGraph] = {}
    for key, segment in segments:
        files[key] = segment_hash(backend, segment) + backend.suffix
        if files[key] not in known:
            distinct.setdefault(files[key], segment)
    backend.prepare(list(distinct.values()))
    reasons = {r: None for segment in distinct.values() for r in backend.unsupported_ops(segment)}
    if reasons:
        lines = "".join(f"\n  {reason}" for reason in reasons)
        raise BackendError(f"the {backend.name} backend cannot build this model:{lines}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for done, _ in enumerate(_built(backend, distinct, weights, folder), 1):
            if progress is not None:
                progress(done, len(distinct))
    except OSError as e:
        raise BundleError(f"cannot write engines to {folder}: {e.strerror or e}") from e
    return files


def _built(backend: Backend, segments: Mapping[str, SegmentGraph], weights: WeightFile, folder: Path) -> Iterator[None]:
    """Build segments, as many at once as the backend can, and yield after each. The first error ends it."""
    if (most := min(backend.builds_at_once, len(segments))) < 2:
        for file, segment in segments.items():
            yield backend.build(segment, weights, folder / file)
        return
    with ThreadPoolExecutor(most) as pool:
        futures = [pool.submit(backend.build, segment, weights, folder / file) for file, segment in segments.items()]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:  # which have not begun
                future.cancel()
