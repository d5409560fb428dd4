"""Arguments of vLLM's with which a `--model-impl` of this plugin would give wrong results, refused at the start."""

from collections.abc import Iterable
from typing import Any

from vllm_longmamba.architectures import MODEL_IMPL, is_mamba1

# Whether it is set, what is set, and why that cannot work.
Obstacle = tuple[bool, str, str]


def refuse(model_impl: str, obstacles: Iterable[Obstacle]) -> None:
    """Refuse the first obstacle that is in the way.

    Raises:
        ValueError: one is.
    """
    for is_set, argument, reason in obstacles:
        if is_set:
            raise ValueError(f"--model-impl {model_impl} does not support {argument}: {reason}; leave it out")


def refuse_unsupported(vllm_config: Any) -> None:
    """Refuse what LongMamba cannot do, with the filter or without it.

    Args:
        vllm_config: vLLM's configuration.

    Raises:
        ValueError: something is set that it cannot do.
    """
    from vllm.platforms import current_platform

    resolve_connector(vllm_config)
    has_drafts = vllm_config.speculative_config is not None
    parallel = vllm_config.parallel_config
    shares_experts = parallel.enable_expert_parallel and parallel.tensor_parallel_size * parallel.data_parallel_size > 1
    obstacles = [
        (
            has_drafts and is_mamba1(vllm_config.model_config.architecture),
            "--speculative-config with Mamba-1 layers",
            "vLLM cannot take rejected tokens out of their states",
        ),
        (
            has_drafts and current_platform.is_cpu(),
            "--speculative-config on a CPU",
            "vLLM does not take rejected tokens out of the states there",
        ),
        (
            has_drafts and not (vllm_config.model_config.is_hybrid or vllm_config.use_v2_model_runner),
            "--speculative-config in vLLM's model runner V1 for a model of Mamba layers only",
            "that runner takes rejected tokens out of the states of models with attention only",
        ),
        (
            shares_experts and current_platform.is_cpu(),
            "--enable-expert-parallel with more than one rank on a CPU",
            "vLLM's experts there take no account of which of them a rank has, and the engine crashes",
        ),
        *kv_transfer(vllm_config),
        flashinfer(vllm_config),
        batch_invariance(),
    ]
    refuse(MODEL_IMPL, obstacles)


def flashinfer(vllm_config: Any) -> Obstacle:
    """What fails at the first decode step otherwise, with vLLM's own Mamba-1 layers as well."""
    from vllm.config.mamba import MambaBackendEnum

    is_flashinfer = vllm_config.mamba_config.backend == MambaBackendEnum.FLASHINFER
    return (
        is_flashinfer and is_mamba1(vllm_config.model_config.architecture),
        "--mamba-backend flashinfer with Mamba-1 layers",
        "FlashInfer updates states that share one decay in each head, as those of Mamba-2 do",
    )


def batch_invariance() -> Obstacle:
    """What vLLM itself refuses where its own Mamba layers choose their backend, which ours do not ask."""
    from vllm import envs

    return (
        bool(envs.VLLM_BATCH_INVARIANT),
        "VLLM_BATCH_INVARIANT=1",
        "neither its Mamba kernels nor vLLM's give results that do not depend on the batch",
    )


def resolve_connector(vllm_config: Any) -> None:
    """Put the connector of --kv-offloading-size into `kv_transfer_config`, in place.

    vLLM itself does so after the models' hooks; a second time changes nothing.
    """
    vllm_config._post_init_kv_transfer_config()


def kv_transfer(vllm_config: Any) -> list[Obstacle]:
    """Connectors that treat the states of Mamba layers as the keys and values of attention."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    config = vllm_config.kv_transfer_config
    if config is None or config.kv_connector is None:
        return []
    knows_states = KVConnectorFactory.supports_hma_config(config)
    return [
        (
            not knows_states,
            f"--kv-transfer-config with {config.kv_connector}",
            "it does not have vLLM's interface SupportsHMA, without which it does not tell the states of Mamba layers "
            "from keys and values",
        )
    ]
