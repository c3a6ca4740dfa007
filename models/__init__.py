# SPDX-License-Identifier: Apache-2.0
"""Model sources: loaders by kind of source, example inputs by model class, and the demo model."""

from __future__ import annotations
