"""Errors a user can cause. Each message names the thing at fault and the way out."""

from __future__ import annotations


class Error(Exception):
    """Base of every error that bad input, a bad bundle or a bad environment can cause.

    The command line prints the message alone and exits with 2; anything that is not an ``Error`` is a defect of ours.
    """


class CaptureError(Error):
    """The module could not be exported to a graph: where, and why."""


class ConvertError(Error):
    """The graph could not be cut as asked: wrong rows, too many ranks, ``strict`` with fallbacks, an unknown pass."""


class BackendError(Error):
    """A backend is missing, or cannot build or load something."""


class BundleError(Error):
    """A bundle is missing, truncated, changed, of another version, or could not be written."""


class InputError(Error):
    """A call does not fit what was converted: another shape, a missing input, a changed constant."""


class UnsupportedError(InputError, AttributeError):
    """A converted module does not have an attribute, or does not do an operation, of the original: ``hasattr`` is
    false."""


class ValueWarning(UserWarning):
    """Weights that are NaN or infinite, or that no layer asks for. The result is that of the original module."""


class RanksDifferError(InputError):
    """The ranks were called differently: at another step, or one of them refused its inputs. Raised on all of them."""


class LaunchError(Error):
    """A rank failed, or the processes could not be started: which rank, and its error."""
