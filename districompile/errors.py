# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can cause. Each message names the thing at fault and the way out."""

from __future__ import annotations


class Error(Exception):
    """Base class of all errors that bad input, a bad bundle or a bad environment can cause.

    The command line prints the message alone and exits with 2. Any other exception is a defect of districompile.
    """


class CaptureError(Error):
    """The module cannot be exported to a graph. The message says where and why."""


class ConvertError(Error):
    """The graph cannot be converted as requested: wrong rows, too many ranks, a fallback with ``strict``, an unknown
    pass."""


class BackendError(Error):
    """A backend is not installed, or cannot build or load a segment."""


class ExtensionError(Error):
    """An extension, or something that an installed package offers by an entry point, cannot be loaded."""


class BundleError(Error):
    """A bundle is missing, damaged or of another version, or cannot be written."""


class InputError(Error):
    """A call does not fit the converted module: another shape, a missing input, a changed constant."""


class UnsupportedError(InputError, AttributeError):
    """A converted module lacks an attribute or an operation of the original. ``hasattr`` is false for it."""


class ValueWarning(UserWarning):
    """Weights are NaN or infinite, or no layer reads them. The result is that of the original module."""


class EngineWarning(UserWarning):
    """Engines compute in other types than the model has, because their library would compute wrongly in those."""


class RanksDifferError(InputError):
    """The ranks were called at different steps, or one refused its inputs. Raised on all ranks."""


class LaunchError(Error):
    """A rank failed, or the processes could not be started. The message names the rank and its error."""


class TransportError(LaunchError):
    """A transfer failed because another rank ended or does not answer.

    ``silent``: the process of that rank still exists, so it will raise no error of its own.
    """

    def __init__(self, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent
