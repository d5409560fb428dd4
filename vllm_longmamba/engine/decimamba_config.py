"""What `--model-impl decimamba` changes in vLLM's configuration before weights are loaded, and refuses in requests."""

import logging
from typing import Any

from vllm_longmamba.architectures import DECIMAMBA, stock_name
from vllm_longmamba.checkpoint.train_length import is_state_spaces
from vllm_longmamba.decimamba_options import KEY, DeciMambaOptions, options_from_config
from vllm_longmamba.engine.prompt_lengths import prompt_length
from vllm_longmamba.engine.refusals import batch_invariance, flashinfer, refuse, resolve_connector

logger = logging.getLogger("vllm.longmamba")

# Settings for models of state-spaces as they are published, by hidden size and number of layers. The first is that of
# DeciMamba's authors for the pass key (github.com/assafbk/DeciMamba), the others those of LongMamba's authors, who
# compared with it (github.com/GATECH-EIC/LongMamba).
_PUBLISHED: dict[tuple[int, int], dict[str, Any]] = {
    (768, 24): {"layers": (12,), "L_base": 2000},
    (2048, 48): {"layers": (12,), "L_base": 4000},
    (2560, 64): {"layers": (22,), "L_base": 4000},
}
_EXAMPLE = """--additional-config '{"decimamba": {"layers": [12], "L_base": 4000}}'"""


class DeciMambaModelConfig:
    """vLLM's per-architecture hook (an entry of MODELS_CONFIG_MAP) for all DeciMamba variants."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Check the options and the engine's arguments. Runs once, in the front-end process.

        The model's published settings are put in the place of options that were not given.

        Args:
            vllm_config: vLLM's configuration, changed in place.

        Raises:
            ValueError: a wrong option, one that is missing, or an argument of vLLM's with which DeciMamba cannot run.
        """
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        options = _resolved_options(vllm_config)
        _refuse_unsupported(vllm_config, options.cut_prompts)
        stock_hook = MODELS_CONFIG_MAP.get(stock_name(vllm_config.model_config.architecture))
        if stock_hook is not None:
            stock_hook.verify_and_update_config(vllm_config)
        vllm_config.additional_config = {**(vllm_config.additional_config or {}), KEY: options.to_dict()}
        logger.info(
            "DeciMamba: of prompts of more than %d tokens, the layers %s keep %s and the last (by the %s of dt)",
            options.tokens_kept()[0] + 1,
            list(options.layers or ()),
            options.tokens_kept(),
            options.score,
        )

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Part of vLLM's hook interface; nothing to do here."""


def refuse_request(vllm_config: Any, request: Any) -> None:
    """Refuse what a prompt that loses tokens cannot have.

    Args:
        vllm_config: configuration of the engine.
        request: vLLM's `EngineCoreRequest`.

    Raises:
        ValueError: the prompt comes piece by piece; or log-probabilities of its tokens are asked for, some of which are
            dropped and have no output.
    """
    if request.resumable:
        raise ValueError(
            "--model-impl decimamba: a prompt cannot be streamed in, because tokens are chosen over all of it; send it "
            "as one request"
        )
    sampling = request.sampling_params
    names = ("prompt_logprobs", "prompt_logprob_token_ids")
    asked = next((name for name in names if getattr(sampling, name, None) is not None), None)
    length = prompt_length(request)
    if asked is not None and options_from_config(vllm_config.additional_config).is_decimated(length):
        raise ValueError(
            f"--model-impl decimamba: {asked} was asked for, but a prompt of {length} tokens is decimated, and tokens "
            "that are dropped have no log-probabilities; leave it out"
        )


def _resolved_options(vllm_config: Any) -> DeciMambaOptions:
    model_config = vllm_config.model_config
    config = model_config.hf_text_config
    layers = config.num_hidden_layers
    options = options_from_config(vllm_config.additional_config)
    if config.model_type == "mamba" and is_state_spaces(config):
        options = options.with_defaults(_PUBLISHED.get((config.hidden_size, layers), {}))
    missing = [name for name in ("layers", "L_base") if getattr(options, name) is None]
    if missing:
        raise ValueError(
            f"--model-impl decimamba: no settings are published for {model_config.model!r}; "
            f"{' and '.join(missing)} must be given, such as {_EXAMPLE}"
        )
    assert options.layers is not None
    if options.layers[-1] >= layers:
        raise ValueError(
            f"additional_config[{KEY!r}]: layers must lie between 0 and {layers - 1}, the last layer of "
            f"{model_config.model!r}, but are {list(options.layers)}"
        )
    return options


def _refuse_unsupported(vllm_config: Any, cut_prompts: bool) -> None:
    resolve_connector(vllm_config)
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    most, longest = scheduler.max_num_scheduled_tokens, vllm_config.model_config.max_model_len
    one_step = "without its option cut_prompts it chooses tokens over the whole prompt, which must be one step"
    obstacles = [
        (not cut_prompts and scheduler.enable_chunked_prefill, "--enable-chunked-prefill", one_step),
        (not cut_prompts and scheduler.long_prefill_token_threshold > 0, "--long-prefill-token-threshold", one_step),
        (
            not cut_prompts and most is not None and most < longest,
            f"--max-num-scheduled-tokens {most} below max_model_len {longest}",
            one_step,
        ),
        (
            cache.enable_prefix_caching,
            "--enable-prefix-caching",
            "which tokens of a prompt's beginning are kept depends on its end, so that its states cannot be shared",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "--kv-transfer-config and --kv-offloading-size",
            "it chooses tokens over the whole prompt, no part of which may come from another engine",
        ),
        (
            vllm_config.parallel_config.pipeline_parallel_size > 1,
            "--pipeline-parallel-size",
            "later ranks would not know which tokens earlier ones dropped (--tensor-parallel-size is supported)",
        ),
        (
            vllm_config.speculative_config is not None,
            "--speculative-config",
            "draft and prompt tokens would share a step",
        ),
        (cache.use_replayssm, "--use-replayssm", "its layers know no states but vLLM's usual ones"),
        flashinfer(vllm_config),
        batch_invariance(),
    ]
    refuse(DECIMAMBA, obstacles)
