# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with stock guests."""

from __future__ import annotations

from kvmpy.errors import KvmpyError


class GuestUnavailableError(KvmpyError):
    """A stock guest cannot be had; the text says what is lacking and how to supply it by hand."""


class PackageError(KvmpyError, ValueError):
    """A package file is damaged, hostile, or not the one that was asked for."""
