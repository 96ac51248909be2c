from __future__ import annotations

import pickle

from linker_core.engine.messages import FinishReason, PromptLogprob, StepOutput, TokenOutput


def test_step_arrives_as_it_was_sent() -> None:
    everything = TokenOutput(
        request_id="r",
        token_id=5,
        finish_reason=FinishReason.LENGTH,
        logprob=-0.5,
        top_logprobs=((5, -0.5), (7, -1.5)),
        prompt_logprobs=(PromptLogprob(token_id=1, logprob=-1.0, rank=2, top_logprobs=()),),
        num_cached_tokens=3,
        queued_s=0.5,
    )
    # A field that is new would be lost on the way otherwise.
    defaults = TokenOutput(request_id="", token_id=0)
    assert all(
        getattr(everything, field) != getattr(defaults, field) for field in TokenOutput._fields
    )
    step = StepOutput(tokens=(everything, defaults))
    assert pickle.loads(pickle.dumps(step)) == step
