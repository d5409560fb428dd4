"""lm-eval's vLLM backend with LongMamba, and without its silent cutting of long prompts."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vllm_longmamba.checkpoint.original_config import ORIGINAL_FORMAT_ATTRIBUTE
from vllm_longmamba.evaluate.engine import EngineContestant
from vllm_longmamba.evaluate.harness.cpu_build import vllm_by_name
from vllm_longmamba.evaluate.methods import LABELS, ModelSettings

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.harness.strict_vllm import StrictVLLM


class HarnessContestant(EngineContestant):
    """A model for lm-eval, with LongMamba or plain; arguments as for `EngineContestant`.

    Attributes:
        tokenizer: name or folder of the tokenizer that vLLM takes.
    """

    def _describe(self, config: Any) -> dict[str, Any]:
        self.tokenizer: str = config.model_config.tokenizer
        self._hf_config = config.model_config.hf_config
        return super()._describe(config) | {"tokenizer": self.tokenizer, "lm_eval": version("lm_eval")}

    @contextmanager
    def start_lm(self, max_model_len: int) -> Iterator["StrictVLLM"]:
        """Start the engine as a model of lm-eval; it is shut down at the end.

        Args:
            max_model_len: tokens of the longest prompt and its answer.
        """
        arguments = self._arguments | {"max_model_len": max_model_len, "tokenizer": self.tokenizer}
        with vllm_by_name(), self._readable_config() as readable:
            from vllm_longmamba.evaluate.harness.strict_vllm import StrictVLLM

            lm = StrictVLLM(readable, arguments)
        try:
            yield lm
        finally:
            lm.model.llm_engine.engine_core.shutdown()

    @contextmanager
    def _readable_config(self) -> Iterator[str]:
        """A folder or name that transformers can read the config of: not so the original state-spaces format."""
        if not hasattr(self._hf_config, ORIGINAL_FORMAT_ATTRIBUTE):
            yield self._arguments["model"]
            return
        with tempfile.TemporaryDirectory() as folder:
            self._hf_config.save_pretrained(folder)
            yield folder


def harness_contestants(methods: Sequence[str], settings: ModelSettings) -> dict[str, HarnessContestant]:
    """Prepare the methods of a comparison.

    Raises:
        ValueError: a method that does not run in vLLM's engine, or engines in parallel (lm-eval would start Ray).
    """
    options: Mapping[str, Mapping[str, Any]] = {"plain": {"filter": False}, "longmamba": settings.options}
    if other := [LABELS[method] for method in methods if method not in options]:
        raise ValueError(f"--method: lm-eval runs here in vLLM's engine, where {', '.join(other)} is not implemented")
    if settings.engine_args.get("data_parallel_size", 1) != 1:
        raise ValueError("--engine-arg data_parallel_size: not with lm-eval here; use --tensor-parallel-size")
    return {method: HarnessContestant(settings.model, options[method], settings.engine_args) for method in methods}
