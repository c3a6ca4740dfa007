# SPDX-License-Identifier: Apache-2.0
"""The process that launches the ranks of a caller: ``python -m districompile.runtime.workers.supervisor``."""

from __future__ import annotations

import json
import sys

from districompile.runtime.processes.launcher import launch
from districompile.runtime.processes.supervisor import supervise
from districompile.runtime.workers.rank import serve_calls


def main() -> int:
    """Launch the ranks and wait for their end."""
    return supervise(_launch)


def _launch(orders: str) -> None:
    start = json.loads(orders)
    launch(serve_calls, (str(start["address"]), str(start["secret"])), int(start["ranks"]), log_dir=start["log_dir"])


if __name__ == "__main__":
    sys.exit(main())
