# SPDX-License-Identifier: Apache-2.0
"""Progress bars behind a small protocol, so that the compiler and the runtime need no terminal library.

Code that takes time accepts ``progress: Progress | None`` and writes::

    with tasks(progress).task("building engines", total=len(work)) as task:
        for item in work:
            ...
            task.advance()

:class:`Silent` draws nothing; :class:`RichProgress` draws bars on standard error, and only when that is a terminal.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol


class Task(Protocol):
    """One bar, as a context manager. Leaving it removes the bar, also after an exception."""

    def advance(self, n: float = 1) -> None:
        """Add ``n`` units to what is done."""

    def describe(self, text: str) -> None:
        """Replace the text beside the bar."""

    def __enter__(self) -> Task: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Progress(Protocol):
    """A source of bars."""

    def task(self, description: str, total: float | None = None) -> Task:
        """Return a new bar. ``total`` counts units of :meth:`Task.advance`; None: unknown."""


class _SilentTask:
    def advance(self, n: float = 1) -> None:
        pass

    def describe(self, text: str) -> None:
        pass

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Silent:
    """A source of bars that draws nothing."""

    def task(self, description: str, total: float | None = None) -> Task:
        return _SilentTask()


class RichProgress:
    """A source of bars on standard error. Tasks may nest. The display runs while at least one task is open."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._open = 0

    def task(self, description: str, total: float | None = None) -> Task:
        return _RichTask(self, description, total)


class _RichTask:
    def __init__(self, owner: RichProgress, description: str, total: float | None) -> None:
        self._owner = owner
        # Descriptions carry layer names such as "blocks[0]", which rich would read as markup.
        self._id = owner._bars.add_task(_plain(description), total=total, visible=False)

    def advance(self, n: float = 1) -> None:
        self._owner._bars.advance(self._id, n)

    def describe(self, text: str) -> None:
        self._owner._bars.update(self._id, description=_plain(text))

    def __enter__(self) -> Task:
        if self._owner._open == 0:
            self._owner._bars.start()
        self._owner._open += 1
        self._owner._bars.update(self._id, visible=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner._open -= 1
        self._owner._bars.remove_task(self._id)
        if self._owner._open == 0:
            self._owner._bars.stop()


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def tasks(progress: Progress | None) -> Progress:
    """Return ``progress``, or a silent source for None."""
    return progress if progress is not None else Silent()


def terminal_progress(enabled: bool = True) -> Progress:
    """Return bars where standard error is a terminal and ``enabled`` holds, else a silent source."""
    return RichProgress() if enabled and sys.stderr.isatty() else Silent()
