"""Fixtures of the server's tests that these need, too."""

from __future__ import annotations

from tests.server.conftest import _scans

__all__ = ["_scans"]  # a fixture of every test
