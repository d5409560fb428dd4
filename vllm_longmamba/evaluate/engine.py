"""A model in vLLM's offline engine, as the tasks need it: first a contestant, and a runner while it is started."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from vllm_longmamba import __version__, decimamba_options
from vllm_longmamba.architectures import DECIMAMBA, MODEL_IMPL, uses_longmamba
from vllm_longmamba.compatibility import installed_vllm_version
from vllm_longmamba.evaluate.scoring import Scoring, forcing_arguments, greedy
from vllm_longmamba.evaluate.statistics import Floats
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.options import options_from_config

Key = TypeVar("Key")
# Wraps the start of an engine.
Starting = Callable[[], AbstractContextManager[None]]
# The methods that are compared, and their names in reports.
LABELS = {"plain": "plain", "longmamba": "LongMamba", "decimamba": "DeciMamba"}
# vLLM's `worker_extension_cls` where the filter is to be changed while the engine runs.
FILTER_EXTENSION = "vllm_longmamba.evaluate.engine.FilterWorkerExtension"
# Prompts handed to the engine at a time, as a multiple of those it runs at once.
_AHEAD = 2
_DEFAULTS = {"max_num_seqs": 32, "enable_prefix_caching": False}


class EngineContestant:
    """A model in vLLM and a method, not yet started.

    Args:
        arguments: of vLLM's `LLM`; the options of LongMamba or DeciMamba are in their `additional_config`.
        method: one of `LABELS`. For "plain", an engine that would filter is refused. That of "longmamba" may yet run
            without the filter, where all prompts are too short for it.
        starting: wraps what vLLM does at the start.

    Attributes:
        description: everything that determines its output, as plain values: weights, table, options, versions.
        encoder: the model's tokenizer.

    Raises:
        ValueError: what the engine's start would raise before it loads weights, such as a missing table; arguments
            that do not fit the method.
    """

    def __init__(
        self, arguments: Mapping[str, Any], method: str = "longmamba", starting: Starting = nullcontext
    ) -> None:
        model_impl = DECIMAMBA if method == "decimamba" else MODEL_IMPL
        self._arguments = {**_DEFAULTS, "model_impl": model_impl, **arguments}
        self._method, self._starting = method, starting
        if self._arguments["model_impl"] != model_impl:
            raise ValueError(
                f"evaluation: model_impl must be {model_impl!r} for this method, but is "
                f"{self._arguments['model_impl']!r}; leave it out"
            )
        with starting():
            from vllm.engine.arg_utils import EngineArgs
            from vllm.tokenizers import cached_tokenizer_from_config
            from vllm.usage.usage_lib import UsageContext

            # As vLLM's `LLM` will make it.
            config = EngineArgs(**self._arguments).create_engine_config(UsageContext.LLM_CLASS)
        self._check(config)
        if method == "decimamba":
            # A text is scored in forced decode steps, see `EngineRunner.tail_logprobs`.
            self._arguments |= forcing_arguments(config, self._arguments.get("logits_processors"))
        with starting():
            tokenizer = cached_tokenizer_from_config(config.model_config)
        self.encoder = Encoder(tokenizer, config.model_config.tokenizer)
        self.description = self._describe(config)

    def _check(self, config: Any) -> None:
        """Refuse an engine that is not what the report will call it, whatever led there."""
        if self._method == "plain" and options_from_config(config.additional_config).filter:
            raise ValueError(
                "evaluation: the plain model runs without the filter, but its engine runs with it; leave filter out of "
                "additional_config"
            )

    def _describe(self, config: Any) -> dict[str, Any]:
        from vllm_longmamba.checkpoint.table_lookup import locate_weights

        description: dict[str, Any] = {
            "weights": locate_weights(config.model_config, config.load_config).fingerprint,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "state_dtype": config.cache_config.mamba_ssm_cache_dtype,
            "quantization": config.model_config.quantization,
            "vllm": installed_vllm_version(),
            "vllm_longmamba": __version__,
        }
        if self._method == "decimamba":
            own = decimamba_options.options_from_config(config.additional_config)
            return description | {"decimamba": own.to_dict()}
        return description | self._describe_filter(config)

    def _describe_filter(self, config: Any) -> dict[str, Any]:
        from vllm_longmamba.calibration.settings import from_config
        from vllm_longmamba.tables import load_table

        options = options_from_config(config.additional_config)
        if not options.filter:
            return {"filter": False}
        source: Any
        if options.table is not None:
            table = load_table(options.table)
            source, thresholds = table.metadata, table.digest()
            end = table.unfiltered_end(options.unfiltered_end)
        else:
            # The engine will make the table at its start; the settings determine it. Of several it uses the first.
            source = from_config(config.additional_config)[0]
            thresholds = source.key()
            end = source.unfiltered_end if options.unfiltered_end is None else options.unfiltered_end
        return {
            "filter": True,
            "table": thresholds,
            "train_length": source.train_length,
            "min_retention": options.min_retention if options.min_retention is not None else source.min_retention,
            "clamp_percent": source.clamp_percent,
            **({"unfiltered_end": end} if end else {}),
            **({"filter_generated": True} if options.filter_generated else {}),
        }

    def make_room(self, tokens: int) -> None:
        """Let prompts and answers have so many tokens, unless the arguments say how many."""
        self._arguments.setdefault("max_model_len", tokens)

    @contextmanager
    def start(self) -> Iterator["EngineRunner"]:
        """Start the engine; it is shut down at the end.

        Raises:
            ValueError: the running engine is not what the method says, or it died.
        """
        from vllm import LLM
        from vllm.v1.engine.exceptions import EngineDeadError

        with self._starting():
            llm = LLM(**self._arguments)
        try:
            self._check(llm.llm_engine.vllm_config)
            yield EngineRunner(llm, self.encoder)
        except EngineDeadError as error:
            raise ValueError(
                "vLLM's engine died, and its log above says why; give the same command again to go on from there"
            ) from error
        finally:
            llm.llm_engine.engine_core.shutdown()


class EngineRunner:
    """A started engine. Jobs are taken from an iterable as they are needed; results come in any order.

    Attributes:
        llm: vLLM's `LLM`.
    """

    def __init__(self, llm: Any, encoder: Encoder) -> None:
        self.llm = llm
        self._encoder = encoder

    def set_filter(self, table: Path, min_retention: float, unfiltered_end: int = 0) -> None:
        """Filter by another table or another theta from now on, in an engine with `FILTER_EXTENSION`.

        Args:
            table: a table of the same rows as the present one.
            min_retention: theta; 1 filters nothing, as no channel has a retention above it.
            unfiltered_end: as many of a prompt's last tokens are not filtered.

        Raises:
            ValueError: a table of other rows, layers or channels.
        """
        self.llm.collective_rpc("longmamba_set_filter", args=(str(table), min_retention, unfiltered_end))

    def complete(self, jobs: Iterable[tuple[Key, list[int], int]]) -> Iterator[tuple[Key, str]]:
        """Continue prompts greedily.

        Args:
            jobs: for each prompt a key, its tokens, and how many to generate at most.

        Returns:
            The key and the text generated.
        """
        requests = ((key, tokens, greedy(max_tokens)) for key, tokens, max_tokens in jobs)
        for key, output in self._stream(requests):
            yield key, self._encoder.decode(list(output.outputs[0].token_ids))

    def tail_logprobs(self, jobs: Iterable[tuple[Key, list[int]]], scored: int) -> Iterator[tuple[Key, Floats]]:
        """Score the last tokens of prompts, which count as prompt tokens themselves.

        Logits of at most a chunk of the prompt exist at a time. vLLM's model runner V2 computes them for the scored
        tokens only. V1, which runs on CPUs, has no such request: there `prompt_logprobs` computes them for every token
        of the prompt, chunk by chunk (max_num_batched_tokens).

        DeciMamba has none of the tokens that it drops. There the scored tokens are no prompt tokens, but generated ones
        that are forced, one a step. Its authors never drop the tokens that they score either, which is the same.

        Args:
            jobs: for each prompt a key and its tokens, more than `scored`.
            scored: tokens to score.

        Returns:
            The key and (scored,) log-probabilities of the last tokens, each given all tokens before it.
        """
        config = self.llm.llm_engine.vllm_config
        scoring = Scoring(config, forced=not uses_longmamba(config.model_config))
        requests = ((key, *scoring.ask(tokens, scored)) for key, tokens in jobs)
        for key, output in self._stream(requests):
            yield key, scoring.read(output, scored)

    def _stream(self, requests: Iterator[tuple[Key, list[int], Any]]) -> Iterator[tuple[Key, Any]]:
        """Keep the engine busy, without handing it all prompts at once; keys and outputs as they are finished."""
        from vllm.inputs import tokens_input

        engine = self.llm.llm_engine
        room = _AHEAD * engine.vllm_config.scheduler_config.max_num_seqs
        waiting: dict[str, Key] = {}
        names = count()
        while True:
            for key, tokens, sampling in islice(requests, room - len(waiting)):
                name = str(next(names))
                engine.add_request(name, tokens_input(tokens), sampling)
                waiting[name] = key
            if not waiting:
                return
            for output in engine.step():
                if output.finished:
                    yield waiting.pop(output.request_id), output


class FilterWorkerExtension:
    """What `EngineRunner.set_filter` calls in every worker."""

    get_model: Any
    vllm_config: Any

    def longmamba_set_filter(self, table: str, min_retention: float, unfiltered_end: int) -> None:
        """See `EngineRunner.set_filter`."""
        from vllm_longmamba.layers.prompt_filter import PromptFilter
        from vllm_longmamba.layers.replace_table import replace_table
        from vllm_longmamba.tables import load_table

        filters_generated = options_from_config(self.vllm_config.additional_config).filter_generated
        new = PromptFilter(load_table(table), min_retention, filters_generated, unfiltered_end)
        replace_table(self.get_model(), new)
