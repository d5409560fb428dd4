"""The engine inside the job: vLLM's `AsyncLLM`, kept full by more requests than it runs at a time."""

import contextlib
import itertools
import math
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

from vllm_longmamba.summarize.prompts import Prompt
from vllm_longmamba.summarize.records import Completion, JobStoppedError, RecordError
from vllm_longmamba.summarize.settings import Sampling

# Requests waiting in the engine beside those that run: a share of these, and enough for small engines, whose places
# may all come free before this process has had its turn on a busy machine.
_WAITING_SHARE = 0.1
_WAITING_ENOUGH = 16

# vLLM's own 5 s are too few for its processes on a busy CPU; killed ones leave warnings and shared memory behind.
_END_TIMEOUT_S = 30.0


class EngineBackend:
    """A vLLM engine of this job's own. Starting it takes from half a minute to some minutes.

    Args:
        arguments: of `AsyncEngineArgs`.
        sampling: how answers are sampled.
        concurrency: requests in the engine at a time; None takes what keeps it full.
    """

    def __init__(self, arguments: dict[str, Any], sampling: Sampling, concurrency: int | None = None) -> None:
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.sampling_params import RequestOutputKind
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        quiet = {"enable_log_requests": False, "disable_log_stats": True}
        with _interrupts_held_back():
            # As large steps and batches as `LLM` takes; the default for a server is a half or an eighth.
            self._engine: Any = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**(quiet | arguments)), usage_context=UsageContext.LLM_CLASS
            )
        self.tokenizer = self._engine.get_tokenizer()
        self.max_model_len: int | None = self._engine.model_config.max_model_len
        self.concurrency = concurrency or kept_full(self._engine.vllm_config.scheduler_config.max_num_seqs)
        self._params = SamplingParams(**sampling.parameters(), output_kind=RequestOutputKind.FINAL_ONLY)
        self._ids = itertools.count()

    async def complete(self, prompt: Prompt) -> Completion:
        """Answer one prompt; see `Backend`."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        assert prompt.token_ids is not None
        request = tokens_input(prompt.token_ids)
        output: Any = None
        try:
            async for last in self._engine.generate(request, self._params, f"summarize-{next(self._ids)}"):
                output = last
        except EngineDeadError as error:
            raise JobStoppedError(f"the engine died ({error}); its messages above say why") from None
        except (VLLMClientError, ValueError) as error:
            raise RecordError("refused", str(error)) from None
        answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise JobStoppedError(f"the engine ended an answer with {answer.finish_reason!r}: it is being shut down")
        return Completion(answer.text, len(prompt.token_ids), len(answer.token_ids), str(answer.finish_reason))

    async def close(self) -> None:
        """End the engine."""
        self._engine.shutdown(timeout=_END_TIMEOUT_S)
        # Its finalizer shuts it down once more, which fails once Python has begun to take modules apart.
        self._engine = None


def kept_full(running: int) -> int:
    """Requests in an engine at a time, so that a place that comes free is taken in the next step."""
    return running + max(math.ceil(running * _WAITING_SHARE), min(running, _WAITING_ENOUGH))


def tokenizer_and_length(arguments: dict[str, Any]) -> tuple[Any, int | None]:
    """(tokenizer, tokens of prompt and answer) of a model that is not loaded."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.tokenizers import cached_tokenizer_from_config

    config = AsyncEngineArgs(**arguments).create_model_config()
    return cached_tokenizer_from_config(config), config.max_model_len if config.max_model_len > 0 else None


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal; those started here never see it, and finish what they run."""
    # It would be started among the others, and lets interrupts through again when it is.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
