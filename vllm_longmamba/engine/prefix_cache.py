"""Keeps vLLM's prefix cache, and the caches of its KV connectors, exact: which states a LongMamba request may use.

A state depends on the thresholds that filtered its prompt, so the first block's hash gets the digest of the table and
the prompt's row. Generated tokens are never filtered, but count as prompt in the next turn of a conversation, so blocks
that hold generated tokens of a filtered request are kept apart too, and so are blocks that hold tokens of a prompt's
unfiltered end. (Block hashes are chained: what changes one changes all that follow.)

vLLM keeps the state at a prompt's last block, which lies in the unfiltered end and so serves prompts of the same length
only. The scheduler is made to stop before the end instead, and to keep the state there: it serves prompts of the row
that begin in the same way and whose own end does not begin before it.

A prompt that is streamed in becomes longer, and its row another, while it runs: its states are no other request's.
"""

import re
import secrets
from typing import Any

from vllm_longmamba.engine.prompt_lengths import prompt_length
from vllm_longmamba.options import options_from_config
from vllm_longmamba.tables import ThresholdTable, load_table

_SALT = re.compile(r"longmamba:[0-9a-f]+:(?P<row>\d+):(?P<end>\d+)\|")


def named_table(vllm_config: Any) -> ThresholdTable | None:
    """The table that the front end has found, for `salt_request`; None where it found none, or nothing is cached.

    To be read once, at the engine's start, as the workers do: what lies there later may be another table, or none.

    Raises:
        TableError: the file cannot be read.
    """
    options = options_from_config(vllm_config.additional_config)
    if not options.filter or options.table is None or not _is_cached(vllm_config):
        return None
    return load_table(options.table)


def salt_request(vllm_config: Any, request: Any, table: ThresholdTable | None) -> None:
    """Add table, row and unfiltered end to a request's cache salt, in place.

    Args:
        vllm_config: configuration of the engine.
        request: vLLM's `EngineCoreRequest`; its own salt, if any, is kept behind ours.
        table: that its workers filter by; None where they filter nothing.
    """
    if table is None or not _is_cached(vllm_config):
        return
    options = options_from_config(vllm_config.additional_config)
    digest, row = table.digest(options.min_retention, options.unfiltered_end), table.row_of(prompt_length(request))
    end = table.unfiltered_end(options.unfiltered_end)
    own = f":{secrets.token_hex(8)}" if request.resumable else ""
    request.cache_salt = f"longmamba:{digest}:{row}:{end}{own}|{request.cache_salt or ''}"


def _is_cached(vllm_config: Any) -> bool:
    return vllm_config.cache_config.enable_prefix_caching or vllm_config.kv_transfer_config is not None


def unfiltered_block_keys(request: Any, end_token: int) -> tuple[tuple[str, int], ...]:
    """Extra hash keys of a block that holds tokens which a filtered request leaves unfiltered by their place.

    Args:
        request: vLLM's `Request`.
        end_token: the position after the block's last token.

    Returns:
        One key, or none where all its tokens are prompt tokens before the unfiltered end, or nothing is filtered.
    """
    filtered = _filtered_tokens(request)
    if filtered is None or end_token <= filtered:
        return ()
    return (("longmamba_prompt_length", request.num_prompt_tokens),)


def next_chunk(scheduler: Any, request: Any, start: int, num_new_tokens: int) -> tuple[int, bool]:
    """Cut a chunk of a prompt where its unfiltered end begins, so that the state there can be kept.

    Args:
        scheduler: vLLM's `Scheduler`.
        request: vLLM's `Request`; told to have the state there kept, in place.
        start: tokens before the chunk.
        num_new_tokens: of the chunk.

    Returns:
        Its tokens; and whether it is the last one and needs no other cut.
    """
    if start >= request.num_prompt_tokens:
        return num_new_tokens, False
    block_size = scheduler.cache_config.block_size
    boundary = _boundary_before_end(request, block_size)
    if scheduler.use_eagle_block_drop:
        # Attention layers then give up the last block that two prompts share.
        boundary -= block_size
    is_whole = start == 0 and num_new_tokens >= request.num_prompt_tokens
    # A prompt that fits into a step is worth no second one where vLLM keeps a state amid a step. And vLLM may have
    # found where a prompt shares more than it can take from the cache, and will keep the state there.
    if (
        boundary <= 0
        or (is_whole and scheduler.mamba_has_prefill_checkpoint_blocks)
        or request.shared_prefix_boundary not in (0, boundary)
    ):
        return num_new_tokens, False
    request.shared_prefix_boundary = boundary
    if start < boundary:
        return min(num_new_tokens, boundary - start), False
    # A chunk that begins amid a block has to end with it: vLLM would take its state for that of the whole block.
    is_last = request.num_tokens == request.num_prompt_tokens == start + num_new_tokens
    return num_new_tokens, is_last and start % block_size == 0


def _boundary_before_end(request: Any, block_size: int) -> int:
    """The last block boundary before the unfiltered end of a filtered request; 0 where there is none or no end."""
    filtered = _filtered_tokens(request)
    if filtered is None or filtered == request.num_prompt_tokens:
        return 0
    return max(filtered, 0) // block_size * block_size


def _filtered_tokens(request: Any) -> int | None:
    """Tokens of a prompt before its unfiltered end, below 0 where the end is longer; None where nothing is filtered."""
    salt = _SALT.match(request.cache_salt) if request.cache_salt is not None else None
    if salt is None or int(salt["row"]) == 0:
        return None
    tokens: int = request.num_prompt_tokens - int(salt["end"])
    return tokens
