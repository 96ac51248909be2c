from __future__ import annotations

import numpy as np

from linker_core.engine.page_table import PageTable


def test_pages_are_contiguous_int32_in_order_however_they_came() -> None:
    table = PageTable([7])
    for page in range(100):
        table.extend([page, page + 1])
    want = [7, *(page for first in range(100) for page in (first, first + 1))]
    assert table.pages.tolist() == want
    assert len(table) == 201
    assert table.pages.dtype == np.int32
    assert table.pages.flags.c_contiguous


def test_clear_forgets_every_page() -> None:
    table = PageTable(range(20))
    table.clear()
    assert len(table) == 0
    table.extend([3])
    assert table.pages.tolist() == [3]
