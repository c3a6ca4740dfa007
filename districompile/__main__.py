# SPDX-License-Identifier: Apache-2.0
"""``python -m districompile``.

The process of each rank imports this file, because it is the main module of the process that started it. Nothing else
is imported then.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line."""
    from districompile.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
