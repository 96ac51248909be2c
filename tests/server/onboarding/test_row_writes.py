from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

from server.onboarding.row_writes import RowWrites
from server.registry.records import ModelRecord, ModelState


def test_writes_that_are_waited_for_are_after_uses_that_are_being_stored() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def touch(_used_at: dict[str, float]) -> None:
        begun.set()
        go_on.wait(60)

    record = ModelRecord(
        name="a", source="", request={}, state=ModelState.READY, position=0, created_at=0.0
    )
    registry: Any = SimpleNamespace(touch=touch)
    shown: Any = SimpleNamespace(models={"a": record})

    async def scenario() -> None:
        writes = RowWrites(registry, shown)
        noting = asyncio.ensure_future(writes.note_use({"a": 1.0}))
        await asyncio.to_thread(begun.wait, 60)
        writing = asyncio.ensure_future(writes.write_later())
        for _ in range(10):
            await asyncio.sleep(0)
        waited = not writing.done()
        go_on.set()
        await asyncio.gather(noting, writing)
        assert waited

    asyncio.run(scenario())
    assert shown.models["a"].last_used_at == 1.0
