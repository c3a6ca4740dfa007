"""Building all segments of a conversion: what is equal is built once, whatever rank or phase it belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TypeVar

from districompile.backends.base import Backend, BuildSegment
from districompile.errors import BackendError, BundleError
from districompile.ir.serialize import content_hash, graph_to_json
from districompile.weights import WeightFile

K = TypeVar("K", bound=Hashable)


def segment_hash(backend: Backend, segment: BuildSegment) -> str:
    """What an engine is named by: the graph, the names of its inputs, outputs and weights, and who builds it."""
    names = [[name for name, _ in group] for group in (segment.inputs, segment.weights, segment.outputs)]
    return content_hash(
        json.dumps([backend.name, backend.version, names, graph_to_json(segment.graph), segment.gathers])
    )


def build_segments(
    backend: Backend,
    segments: Iterable[tuple[K, BuildSegment]],
    weights: WeightFile,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[K, str]:
    """Build every segment into ``folder`` and give each key's engine file name, ``<hash><suffix>``.

    Equal segments share a file; ``progress`` is told how many distinct ones are done and how many there are. Raises
    :class:`BackendError` with every reason if the backend refuses anything, before the first engine is built.
    """
    files: dict[K, str] = {}
    distinct: dict[str, BuildSegment] = {}
    for key, segment in segments:
        files[key] = segment_hash(backend, segment) + backend.suffix
        distinct.setdefault(files[key], segment)
    backend.prepare(list(distinct.values()))
    reasons = {r: None for segment in distinct.values() for r in backend.refuses(segment)}
    if reasons:
        lines = "".join(f"\n  {reason}" for reason in reasons)
        raise BackendError(f"the {backend.name} backend cannot build this model:{lines}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for done, (file, segment) in enumerate(distinct.items(), 1):
            backend.build(segment, weights, folder / file)
            if progress is not None:
                progress(done, len(distinct))
    except OSError as e:
        raise BundleError(f"cannot write engines to {folder}: {e.strerror or e}") from e
    return files
