# SPDX-License-Identifier: Apache-2.0
"""The error of model sources, in a module that imports no PyTorch."""

from __future__ import annotations

from districompile.errors import Error


class ModelError(Error):
    """A model is unknown, cannot be loaded, or does not work at the requested size."""
