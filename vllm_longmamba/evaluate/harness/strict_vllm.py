"""lm-eval's vLLM backend as a class that says what it would cut (imports lm-eval, datasets and vLLM)."""

from collections.abc import Mapping
from typing import Any

from lm_eval.models.vllm_causallms import VLLM


class StrictVLLM(VLLM):  # type: ignore[misc]
    """lm-eval's `vllm` model. The stock class cuts the begin of a prompt that is too long, with a line in the log.

    Args:
        readable: name or folder of a config.json that transformers can read; the stock class reads one, for nothing
            that matters to these models.
        arguments: of vLLM's `LLM`. "model" wins over `readable` there.
    """

    def __init__(self, readable: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(pretrained=readable, batch_size="auto", **arguments)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See `lm_eval.api.model.LM`.

        Raises:
            ValueError: a prompt and its answer are longer than the engine's `max_model_len`.
        """
        prompts, settings = zip(*(request.args for request in requests), strict=True)
        for tokens, own in zip(self.tok_encode(list(prompts)), settings, strict=True):
            _, _, room = self.modify_gen_kwargs(own, default_max_gen_toks=self.max_gen_toks)
            if len(tokens) + room > self.max_length:
                raise ValueError(
                    f"a prompt of {len(tokens)} tokens and its answer of up to {room} do not fit max_model_len "
                    f"{self.max_length}, and lm-eval would cut the prompt's begin; raise --max-model-len"
                )
        return list(super().generate_until(requests, disable_tqdm=disable_tqdm))
