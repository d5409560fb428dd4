"""How vLLM's engine is asked for the log-probabilities of a text's last tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_longmamba.evaluate.statistics import Floats

# What a request names the tokens that are to be generated in model runner V1.
FORCED = "longmamba_forced_tokens"


class Scoring:
    """Requests for log-probabilities, and what is read from their outputs.

    Args:
        vllm_config: of the engine; where tokens are to be forced, with `forcing_arguments`.
        forced: the scored tokens are generated, one a step, whatever their probability. Otherwise they are prompt
            tokens.
    """

    def __init__(self, vllm_config: Any, forced: bool) -> None:
        from vllm import SamplingParams

        self._forced, self._v2 = forced, vllm_config.use_v2_model_runner
        self._tail_only = not forced and self._v2 and hasattr(SamplingParams, "prompt_logprob_token_ids")

    def ask(self, tokens: list[int], scored: int) -> tuple[list[int], Any]:
        """From a text's tokens, and how many to score, to a prompt and its sampling parameters."""
        prompt, last = tokens[:-scored], tokens[-scored:]
        if self._forced:
            force = {"trace_decode_token_ids": last} if self._v2 else {"extra_args": {FORCED: last}}
            return prompt, greedy(scored, logprobs=0, ignore_eos=True, **force)
        # vLLM insists on generating one token.
        if self._tail_only:
            ids = np.array(last, dtype=np.int32)[:, None]
            return tokens, greedy(1, prompt_logprob_token_ids=ids, prompt_logprob_start=len(prompt) - 1)
        return tokens, greedy(1, prompt_logprobs=0, flat_logprobs=True)

    def read(self, output: Any, scored: int) -> Floats:
        """(scored,) log-probabilities from the output of a request."""
        if self._tail_only:
            return np.asarray(output.prompt_token_id_logprobs, dtype=np.float64)[:, 0]
        tokens, entries = output.prompt_token_ids, output.prompt_logprobs
        if self._forced:
            tokens, entries = output.outputs[0].token_ids, output.outputs[0].logprobs
        return np.array([of[token].logprob for token, of in zip(tokens[-scored:], entries[-scored:], strict=True)])


def forcing_arguments(vllm_config: Any, logits_processors: Sequence[Any] | None = None) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` for forced scoring; model runner V2 can force tokens by itself.

    Args:
        vllm_config: as it would be without them.
        logits_processors: of the user.
    """
    if vllm_config.use_v2_model_runner:
        return {"enable_trace_replay": True}
    own = "vllm_longmamba.evaluate.forced_tokens:ForcedTokens"
    return {"logits_processors": [*(logits_processors or ()), own]}


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
