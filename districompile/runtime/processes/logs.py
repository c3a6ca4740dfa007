# SPDX-License-Identifier: Apache-2.0
"""The output of ranks, in files and, with each line marked, on the output of the launcher."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

_PERIOD = 0.1  # seconds


class Logs:
    """Files for the output of each rank in a new folder, whose lines are shown while this is entered.

    ``FOLDER/TIME-PROCESS/RANK/stdout.log`` and ``stderr.log``.
    """

    def __init__(self, folder: Path, nproc: int) -> None:
        self._run = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        number = 1
        while self._run.exists():
            number += 1
            self._run = self._run.with_name(f"{self._run.name.partition('_')[0]}_{number}")
        self._tails: list[_Tail] = []
        for rank in range(nproc):
            for path, to_err in zip(self.files(rank), (False, True), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                self._tails.append(_Tail(path, f"[rank {rank}] ", to_err))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="districompile-logs", daemon=True)

    def files(self, rank: int) -> tuple[Path, Path]:
        """Return the files for the output and the errors of a rank."""
        return self._run / str(rank) / "stdout.log", self._run / str(rank) / "stderr.log"

    def __enter__(self) -> Logs:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for tail in self._tails:
            tail.show(last=True)

    def _follow(self) -> None:
        while not self._stop.wait(_PERIOD):
            for tail in self._tails:
                tail.show()


class _Tail:
    """The part of a file that was not shown yet."""

    def __init__(self, path: Path, mark: str, to_err: bool) -> None:
        self._file: BinaryIO = path.open("rb")
        self._mark, self._to_err = mark, to_err
        self._rest = b""

    def show(self, last: bool = False) -> None:
        """Show the lines that are complete, and with ``last`` the others too."""
        lines = (self._rest + self._file.read()).splitlines(keepends=True)
        self._rest = b"" if last or not lines or lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        stream = sys.stderr if self._to_err else sys.stdout
        for line in lines:
            stream.write(self._mark + line.decode(errors="replace").rstrip("\r\n") + "\n")
        if lines:
            stream.flush()
        if last:
            self._file.close()
