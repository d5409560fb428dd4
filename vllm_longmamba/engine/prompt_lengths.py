"""How the length S of a prompt reaches the filter: the three ways in.

1. **Model runner V2** (the default on CUDA): `LongMambaModelState` (model_state.py), by vLLM's public hook
   `get_model_state_cls`, remembers S of each request and puts it into the metadata that every builder receives, as
   `rswa_prefix_lens`.
2. **Model runner V1** (CPU): vLLM itself fills `rswa_prefix_lens`, but only for models with one kind of sliding-window
   attention. `shown_to_builders` makes it do so for ours; patches.py calls it.
3. **The prefix cache** sees no metadata: prefix_cache.py takes S from the request (`prompt_length`) and puts the row of
   the table into the request's cache salt.

Where a prompt is computed for another engine (disaggregated prefill), vLLM takes its last token off; 1 and 2 add it.

`layers.prompt_filter.step_rows_from_metadata` makes the rows of a step from `rswa_prefix_lens`. A preempted request
comes back with its original S in all three.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shown_to_builders(runner: Any) -> Iterator[None]:
    """While it lasts, model runner V1 hands prompt lengths to the metadata builders.

    It does so only where `rswa_window` is set. Attention backends read that when they are built, which is over by now,
    so that only the builders of this plugin see the lengths.

    Args:
        runner: vLLM's `GPUModelRunner`, changed in place and changed back.
    """
    arch_config = runner.model_config.model_arch_config
    before, shortened = arch_config.rswa_window, _shortened_rows(runner)
    arch_config.rswa_window = runner.model_config.max_model_len
    runner.input_batch.num_prompt_tokens[shortened] += 1
    try:
        yield
    finally:
        arch_config.rswa_window = before
        runner.input_batch.num_prompt_tokens[shortened] -= 1


def _shortened_rows(runner: Any) -> list[int]:
    if runner.vllm_config.kv_transfer_config is None:
        return []
    names = enumerate(runner.input_batch.req_ids)
    return [row for row, name in names if was_shortened(runner.requests[name].sampling_params)]


def was_shortened(sampling_params: Any) -> bool:
    """Whether vLLM took the last token off a prompt.

    It does so where a prompt is computed for another engine, which starts from the state before that token. The row
    of the table is still that of the whole prompt.

    Args:
        sampling_params: of the request, as a worker sees them; None for pooling models.
    """
    extra = getattr(sampling_params, "extra_args", None) or {}
    return bool((extra.get("kv_transfer_params") or {}).get("_p_side_truncated"))


def prompt_length(request: Any) -> int:
    """Tokens of a vLLM `EngineCoreRequest`'s prompt."""
    tokens = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
    return len(tokens)
