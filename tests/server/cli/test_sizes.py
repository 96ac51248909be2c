"""Bytes as the commands write them."""

from __future__ import annotations

from server.cli.sizes import MIB, mib, mib_cell


def test_sizes_are_mebibytes_in_one_form() -> None:
    sizes = (0, MIB // 5, 14 * MIB, 14_600 * MIB)
    assert [mib(size) for size in sizes] == ["0.0 MiB", "0.2 MiB", "14.0 MiB", "14600.0 MiB"]
    assert [mib_cell(size) for size in sizes] == ["0.00", "0.20", "14.00", "14600.00"]
