"""How the length S of a prompt reaches the filter: the three ways in.

1. **Model runner V2** (the default on CUDA): `LongMambaModelState` (model_state.py), by vLLM's public hook
   `get_model_state_cls`, remembers S of each request and puts it into the metadata that every builder receives, as
   `rswa_prefix_lens`.
2. **Model runner V1** (CPU): vLLM itself fills `rswa_prefix_lens`, but only for models with one kind of sliding-window
   attention. `shown_to_builders` makes it do so for ours; patches.py calls it.
3. **The prefix cache** sees no metadata: prefix_cache.py takes S from the request (`prompt_length`) and puts the row of
   the table into the request's cache salt.

Where a prompt is computed for another engine (disaggregated prefill), vLLM takes its last tokens off, which that engine
computes itself. `keep_prompt_length` writes S into such a request before, and 1 and 2 read it there.

`layers.prompt_filter.step_rows_from_metadata` makes the rows of a step from `rswa_prefix_lens`. A preempted request
comes back with its original S in all three.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_WHOLE = "longmamba_prompt_length"


@contextmanager
def shown_to_builders(runner: Any) -> Iterator[None]:
    """While it lasts, model runner V1 hands prompt lengths to the metadata builders.

    It does so only where `rswa_window` is set. Attention backends read that when they are built, which is over by now,
    so that only the builders of this plugin see the lengths.

    Args:
        runner: vLLM's `GPUModelRunner`, changed in place and changed back.
    """
    arch_config, lengths = runner.model_config.model_arch_config, runner.input_batch.num_prompt_tokens
    window, shortened = arch_config.rswa_window, _shortened_prompts(runner)
    arch_config.rswa_window = runner.model_config.max_model_len
    before = {row: int(lengths[row]) for row in shortened}
    for row, length in shortened.items():
        lengths[row] = length
    try:
        yield
    finally:
        arch_config.rswa_window = window
        for row, length in before.items():
            lengths[row] = length


def _shortened_prompts(runner: Any) -> dict[int, int]:
    """Row of the batch -> length of the whole prompt."""
    if runner.vllm_config.kv_transfer_config is None:
        return {}
    known = {
        row: whole_prompt_length(runner.requests[name].sampling_params)
        for row, name in enumerate(runner.input_batch.req_ids)
    }
    return {row: length for row, length in known.items() if length is not None}


def keep_prompt_length(request: Any) -> None:
    """Write the prompt's length into a request whose prompt is computed for another engine, in place.

    What a client itself has sent under that name (`vllm_xargs` of vLLM's server) is taken out: it would choose a row
    that the prefix cache does not know of, and a worker fails on what is no number.

    Args:
        request: vLLM's `EngineCoreRequest`, before vLLM takes the last tokens off its prompt.
    """
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    if (extra.get("kv_transfer_params") or {}).get("do_remote_decode"):
        request.sampling_params.extra_args = {**extra, _WHOLE: prompt_length(request)}
    elif _WHOLE in extra:
        request.sampling_params.extra_args = {name: value for name, value in extra.items() if name != _WHOLE}


def whole_prompt_length(sampling_params: Any) -> int | None:
    """What `keep_prompt_length` wrote, as a worker reads it; None for other requests.

    Args:
        sampling_params: of the request; None for pooling models.
    """
    length: int | None = (getattr(sampling_params, "extra_args", None) or {}).get(_WHOLE)
    return length


def prompt_length(request: Any) -> int:
    """Tokens of a vLLM `EngineCoreRequest`'s prompt."""
    tokens = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
    return len(tokens)
