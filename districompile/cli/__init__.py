# SPDX-License-Identifier: Apache-2.0
"""What the commands of :mod:`districompile.cli.main` do, one module each."""

from __future__ import annotations
