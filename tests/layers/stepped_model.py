"""Runs a vLLM model one step at a time without an engine: steps of any shape, within seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


@dataclass
class Request:
    """One prompt.

    Attributes:
        prompt: its tokens.
        generated: tokens behind it.
        read: how many of all these the model has read.
        logits: (vocabulary,) after the last token of each step.
    """

    prompt: list[int]
    generated: list[int] = field(default_factory=list)
    read: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


def step_metadata(
    lengths: Sequence[int],
    read: Sequence[int],
    blocks: Sequence[Sequence[int]],
    is_prefilling: Sequence[bool],
    prompt_lengths: Sequence[int],
) -> Any:
    """vLLM's `CommonAttentionMetadata` of a step, all of it on the CPU.

    Args:
        lengths: tokens of each sequence in this step.
        read: tokens of each sequence with those of this step.
        blocks: each sequence's row of the block table.
        is_prefilling: whether it still reads its prompt.
        prompt_lengths: of each sequence.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    sequences = torch.tensor(read, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=sequences,
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=max(read),
        block_table_tensor=torch.tensor(blocks, dtype=torch.int32),
        slot_mapping=torch.empty(0),
        is_prefilling=torch.tensor(is_prefilling),
        seq_lens_cpu_upper_bound=sequences,
        rswa_prefix_lens=torch.tensor(prompt_lengths, dtype=torch.int32),
    )


class SteppedModel:
    """A model of float32 on the CPU. Request i of a step has the states of slot i + 1."""

    def __init__(self, folder: Path, slots: int = 16, **engine_args: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend
        from vllm.model_executor.model_loader import get_model
        from vllm.platforms import current_platform
        from vllm.utils.network_utils import get_distributed_init_method, get_open_port

        arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "skip_tokenizer_init": True}
        self.config = EngineArgs(model=str(folder), **(arguments | engine_args)).create_engine_config()
        current_platform.register_triton_kernel_overrides()
        # As vLLM's CPU worker does: there is no accelerator whose cache could be emptied.
        no_cache = mock.patch("torch.accelerator.empty_cache")
        with set_current_vllm_config(self.config), no_cache:
            # An engine of another test may be open in this process.
            self._owns_process_group = not torch.distributed.is_initialized()
            method = get_distributed_init_method("127.0.0.1", get_open_port())
            init_distributed_environment(1, 0, method, 0, backend="gloo")
            ensure_model_parallel_initialized(1, 1)
            self.model = get_model(vllm_config=self.config)
            layers = self.config.compilation_config.static_forward_context
            self.names = list(layers)
            first = layers[self.names[0]]
            spec = first.get_kv_cache_spec(self.config)
            groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
            initialize_mamba_ssu_backend(self.config.mamba_config, groups)
            for layer in layers.values():
                layer.kv_cache = tuple(
                    torch.zeros((slots + 1, *shape), dtype=dtype)
                    for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
                )
            builder = first.get_attn_backend().get_builder_cls()
            self.builder = builder(spec, self.names, self.config, torch.device("cpu"))

    @torch.inference_mode()
    def step(
        self,
        decoding: Sequence[tuple[int, Request]],
        reading: Sequence[tuple[int, Request]],
        part: int | None = None,
    ) -> None:
        """Run the last generated token of some requests, and prompt and generated tokens of others.

        Args:
            decoding: slots and requests.
            reading: slots and requests; what is in their slots is forgotten.
            part: tokens of each of the latter to read from where it stands; None for all of them, from the begin.
        """
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context

        requests = [*decoding, *reading]
        tokens = [request.generated[-1:] for _, request in decoding]
        for _, request in reading:
            begin = request.read if part is not None else 0
            tokens.append((request.prompt + request.generated)[begin:][:part])
            request.read = begin + len(tokens[-1])
        read = [len(request.prompt) + len(request.generated) for _, request in decoding]
        read += [request.read for _, request in reading]
        common = step_metadata(
            [len(one) for one in tokens],
            read,
            [[slot] for slot, _ in requests],
            [False] * len(decoding) + [True] * len(reading),
            [len(request.prompt) for _, request in requests],
        )
        metadata = self.builder.build(0, common)
        ids = torch.tensor([token for one in tokens for token in one])
        with (
            set_current_vllm_config(self.config),
            set_forward_context(dict.fromkeys(self.names, metadata), self.config),
        ):
            hidden = self.model(ids, torch.arange(len(ids)))
            logits = self.model.compute_logits(hidden[common.query_start_loc[1:].long() - 1])
        for (_, request), row in zip(requests, logits, strict=True):
            request.logits.append(row)

    def close(self) -> None:
        """Let an engine start in this process again."""
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        if self._owns_process_group:
            destroy_model_parallel()
            destroy_distributed_environment()
