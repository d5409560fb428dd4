"""Makes vLLM's model runner V1 generate given tokens, so that a text is scored while it is decoded."""

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_longmamba.evaluate.scoring import FORCED


class ForcedTokens(AdapterLogitsProcessor):  # type: ignore[misc]
    """Acts on requests that name tokens in `extra_args`. Log-probabilities are taken before, from the raw logits."""

    def is_argmax_invariant(self) -> bool:
        """See vLLM's `LogitsProcessor`."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> "_Force | None":
        """See vLLM's `AdapterLogitsProcessor`."""
        forced = (params.extra_args or {}).get(FORCED)
        return None if forced is None else _Force(forced)


class _Force:
    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def __call__(self, generated: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[self._tokens[len(generated)]] = torch.inf
        return logits
