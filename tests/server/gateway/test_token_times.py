"""That no time of a token is the client's who reads it."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from linker_core.engine.messages import SamplingParams
from server.gateway.generation import SequenceSpec, TextOptions, generate
from tests.server.live import LiveServer

_NUM_TOKENS = 5
_TO_THE_END = ("e2e_request_latency", "request_inference_time", "request_decode_time")


def test_answer_that_is_read_late_took_as_long_as_the_engine_took(server: LiveServer) -> None:
    async def read_late() -> float:
        """Returns how long after its arrival a request was read, all tokens being there."""
        client = server.services.engine.serving_client
        spec = SequenceSpec(
            request_id="read-late",
            index=0,
            model=server.served("base"),
            prompt_ids=(70, 71),
            sampling=SamplingParams(max_tokens=_NUM_TOKENS),
            text=TextOptions(),
            arrived_at=time.monotonic(),
        )
        pieces = generate([spec], client=client, metrics=server.services.metrics)
        async with aclosing(pieces):
            num_tokens = len(await anext(pieces))
            mailbox = client._mailboxes[spec.request_id]
            async with asyncio.timeout(60):
                while num_tokens + len(mailbox._tokens) < _NUM_TOKENS:
                    await asyncio.sleep(0)
            read_s = time.monotonic() - spec.arrived_at
            async for deltas in pieces:
                num_tokens += len(deltas)
        assert num_tokens == _NUM_TOKENS
        return read_s

    def seen(family: str) -> float:
        return server.metric(f'linker_{family}_seconds_sum{{model="base"}}')

    families = (*_TO_THE_END, "inter_token_latency")
    before = {family: seen(family) for family in families}
    read_s = server.call(read_late())
    for family in families:
        assert 0 < seen(family) - before[family] <= read_s, family
