"""How vLLM's engine is asked for the log-probabilities of a text's last tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vllm_longmamba.evaluate.statistics import Floats

# From a text's tokens and how many to score to a prompt and its sampling parameters; from the output to what is wanted.
Asking = Callable[[list[int], int], tuple[list[int], Any]]
Reading = Callable[[Any, int], Floats]
# What a request names the tokens that are to be generated in model runner V1.
FORCED = "longmamba_forced_tokens"


def tail_scoring(vllm_config: Any) -> tuple[Asking, Reading]:
    """Where the scored tokens are prompt tokens: how to ask, and how to read the output."""
    from vllm import SamplingParams

    def ask_for_the_tail(tokens: list[int], scored: int) -> tuple[list[int], Any]:
        ids = np.array(tokens[-scored:], dtype=np.int32)[:, None]
        # vLLM insists on generating one token.
        return tokens, greedy(1, prompt_logprob_token_ids=ids, prompt_logprob_start=len(tokens) - 1 - scored)

    def read_the_tail(output: Any, scored: int) -> Floats:
        return np.asarray(output.prompt_token_id_logprobs, dtype=np.float64)[:, 0]

    def ask_for_all(tokens: list[int], scored: int) -> tuple[list[int], Any]:
        return tokens, greedy(1, prompt_logprobs=0, flat_logprobs=True)

    def read_all(output: Any, scored: int) -> Floats:
        tokens, entries = output.prompt_token_ids[-scored:], output.prompt_logprobs[-scored:]
        return np.array([entry[token].logprob for token, entry in zip(tokens, entries, strict=True)])

    if vllm_config.use_v2_model_runner and hasattr(SamplingParams, "prompt_logprob_token_ids"):
        return ask_for_the_tail, read_the_tail
    return ask_for_all, read_all


def forcing_arguments(vllm_config: Any, logits_processors: Sequence[Any] | None = None) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` for `forced_scoring`; model runner V2 can force tokens by itself.

    Args:
        vllm_config: as it would be without them.
        logits_processors: of the user.
    """
    if vllm_config.use_v2_model_runner:
        return {"enable_trace_replay": True}
    own = "vllm_longmamba.evaluate.forced_tokens:ForcedTokens"
    return {"logits_processors": [*(logits_processors or ()), own]}


def forced_scoring(vllm_config: Any) -> tuple[Asking, Reading]:
    """Where they are generated, one a step, whatever their probability: the same."""

    def ask(tokens: list[int], scored: int) -> tuple[list[int], Any]:
        prompt, forced = tokens[:-scored], tokens[-scored:]
        own = (
            {"trace_decode_token_ids": forced} if vllm_config.use_v2_model_runner else {"extra_args": {FORCED: forced}}
        )
        return prompt, greedy(scored, logprobs=0, ignore_eos=True, **own)

    def read(output: Any, scored: int) -> Floats:
        generated = output.outputs[0]
        entries = zip(generated.token_ids, generated.logprobs, strict=True)
        return np.array([of_step[token].logprob for token, of_step in entries])

    return ask, read


def greedy(max_tokens: int, **arguments: Any) -> Any:
    """Sampling parameters; more of them as arguments."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **arguments,
    )
