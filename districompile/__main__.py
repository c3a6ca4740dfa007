"""``python -m districompile``."""

from __future__ import annotations

import sys

from districompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
