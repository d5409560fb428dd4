"""How the length S of a prompt reaches the filter: the three ways in.

1. **Model runner V2** (the default on CUDA): `LongMambaModelState` (model_state.py), by vLLM's public hook
   `get_model_state_cls`, remembers S of each request and puts it into the metadata that every builder receives, as
   `rswa_prefix_lens`.
2. **Model runner V1** (CPU): vLLM itself fills `rswa_prefix_lens`, but only for models with one kind of sliding-window
   attention. `shown_to_builders` makes it do so for ours; patches.py calls it.
3. **The prefix cache** sees no metadata: prefix_cache.py takes S from the request (`prompt_length`) and puts the row of
   the table into the request's cache salt.

`layers.prompt_filter.step_rows_from_metadata` makes the rows of a step from `rswa_prefix_lens`. A preempted request
comes back with its original S in all three.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def shown_to_builders(model_config: Any) -> Iterator[None]:
    """While it lasts, model runner V1 hands prompt lengths to the metadata builders.

    It does so only where `rswa_window` is set. Attention backends read that when they are built, which is over by now,
    so that only the builders of this plugin see the lengths.

    Args:
        model_config: vLLM's `ModelConfig`, changed in place and changed back.
    """
    arch_config = model_config.model_arch_config
    before = arch_config.rswa_window
    arch_config.rswa_window = model_config.max_model_len
    try:
        yield
    finally:
        arch_config.rswa_window = before


def prompt_length(request: Any) -> int:
    """Tokens of a vLLM `EngineCoreRequest`'s prompt."""
    tokens = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
    return len(tokens)
