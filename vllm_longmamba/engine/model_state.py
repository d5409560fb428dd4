"""Prompt lengths in vLLM's model runner V2 (see prompt_lengths.py), by its public hook for model states."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from vllm_longmamba.engine.prompt_lengths import whole_prompt_length
from vllm_longmamba.options import options_from_config


class LongMambaModelState(MambaHybridModelState):  # type: ignore[misc]
    """vLLM's state of Mamba and hybrid models, which also remembers each request's prompt length."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self._prompt_lengths = np.zeros(self.max_num_reqs, np.int32)
        self._filters_generated = options_from_config(vllm_config.additional_config).filter_generated

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """See vLLM; a resumed request comes with its original prompt length."""
        super().add_request(req_index, new_req_data)
        whole = whole_prompt_length(new_req_data.sampling_params)
        self._prompt_lengths[req_index] = new_req_data.prompt_len if whole is None else whole

    def prepare_attn(self, input_batch: Any, *args: Any, for_capture: bool = False, **kwargs: Any) -> dict[str, Any]:
        """See vLLM; the prompt lengths reach the metadata builders as `rswa_prefix_lens`, on the host.

        Steps that only decode do without, unless they filter: host time is a good part of theirs.
        """
        if not self._filters_generated and not input_batch.is_prefilling_np.any():
            return super().prepare_attn(input_batch, *args, for_capture=for_capture, **kwargs)  # type: ignore[no-any-return]
        lengths = np.zeros(input_batch.num_reqs_after_padding, np.int32)
        if not for_capture:
            lengths[: input_batch.num_reqs] = self._prompt_lengths[input_batch.idx_mapping_np[: input_batch.num_reqs]]
        input_batch = replace(input_batch, prompt_lens=torch.from_numpy(lengths))
        return super().prepare_attn(input_batch, *args, for_capture=for_capture, **kwargs)  # type: ignore[no-any-return]
