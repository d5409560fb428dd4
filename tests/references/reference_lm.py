"""LongMamba inside whole language models in plain torch: slow, short, and independent of vLLM and of our kernels.

Written from the formulas of Mamba (arXiv 2312.00752), Mamba-2 (2405.21060) and LongMamba (2504.16053):
`h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`, where a prompt token whose dt is at or below its channel's threshold gets
dt = 0.

Pure Mamba models (original and Hugging Face format, FalconMamba) run on our own loop over tokens. Hybrids run in
transformers: their Mamba-2 mixers get the raw dt of filtered tokens set to -inf by a hook, their Mamba-1 mixers are
replaced by our own.

The layer index is the integer after "layers." in the module's name, which vLLM and transformers share.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

PURE_FAMILIES = ("mamba", "mamba2", "falcon_mamba")
NORM_EPS = 1e-5  # mamba_ssm's default, which original checkpoints do not store


def reference_logprobs(
    model_path: Path,
    token_ids: Sequence[int],
    *,
    prompt_length: int,
    filters: Mapping[int, torch.Tensor] | None = None,
    unfiltered_end: int = 0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Log-probabilities of the next token after each position of prompt + generated tokens, in one pass.

    Args:
        model_path: a folder with config.json and pytorch_model.bin or model.safetensors.
        token_ids: the prompt followed by the generated tokens.
        prompt_length: how many of them are prompt. Positions from here on are never filtered.
        filters: layer index -> (channels,) threshold on dt for this prompt length; -1 for a local channel. A prompt
            token with dt <= threshold gets dt = 0. Layers left out are not filtered. Avoid thresholds that equal a dt
            of the prompt: float64 here and float32 in an engine may put that token on different sides.
        unfiltered_end: as many of the prompt's last tokens are not filtered.
        dtype: of weights and arithmetic. In hybrids, transformers does parts of it in float32 all the same.

    Returns:
        (tokens, vocabulary) `dtype`. The vocabulary counts all rows of the head, padding included, as in mamba_ssm.
    """
    steps = TimeSteps(prompt_length, filters or {}, unfiltered_end)
    return _logprobs(model_path, token_ids, steps, dtype)


def reference_dt(
    model_path: Path, token_ids: Sequence[int], *, dtype: torch.dtype = torch.float64
) -> dict[int, torch.Tensor]:
    """The plain model's dt after softplus: layer index -> (tokens, channels) `dtype`. Attention has no entry."""
    steps = TimeSteps(0, {})
    _logprobs(model_path, token_ids, steps, dtype)
    return steps.dt


def transformers_logprobs(
    model_path: Path,
    token_ids: Sequence[int],
    *,
    prompt_length: int,
    filters: Mapping[int, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """As `reference_logprobs`, through transformers for every family; with filters, Mamba-1 mixers are our own."""
    steps = TimeSteps(prompt_length, filters or {})
    with _one_thread():
        return _transformers_logprobs(model_path, token_ids, steps, dtype, own_mamba1=bool(filters))


class TimeSteps:
    """Records the dt of one pass over a sequence and applies the filter to it.

    Attributes:
        dt: layer index -> (tokens, channels), before the filter.
    """

    def __init__(self, prompt_length: int, thresholds: Mapping[int, torch.Tensor], unfiltered_end: int = 0) -> None:
        self.filtered_length = prompt_length - unfiltered_end
        self.thresholds = thresholds
        self.dt: dict[int, torch.Tensor] = {}

    def is_filtered(self, layer: int, dt: torch.Tensor) -> torch.Tensor:
        """(tokens, channels) bool for the dt (tokens, channels) of one layer, which is recorded."""
        if layer in self.dt:
            raise ValueError(f"layer {layer} ran twice in one pass")
        self.dt[layer] = dt
        if layer not in self.thresholds:
            return torch.zeros_like(dt, dtype=torch.bool)
        threshold = self.thresholds[layer].to(dt.dtype)
        if threshold.shape != dt.shape[1:]:
            raise ValueError(f"layer {layer} has {dt.shape[1]} channels, its filter {tuple(threshold.shape)}")
        may_be_filtered = torch.arange(dt.shape[0]) < self.filtered_length
        return may_be_filtered[:, None] & (dt <= threshold)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Many tiny operations: on a busy machine a second thread makes them twenty times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _logprobs(model_path: Path, token_ids: Sequence[int], steps: TimeSteps, dtype: torch.dtype) -> torch.Tensor:
    config = json.loads((Path(model_path) / "config.json").read_text())
    with _one_thread():
        if config.get("model_type", "mamba") in PURE_FAMILIES:
            logprobs = _pure_logprobs(model_path, config, token_ids, steps, dtype)
        else:
            logprobs = _transformers_logprobs(model_path, token_ids, steps, dtype, own_mamba1=True)
    if unknown := set(steps.thresholds) - set(steps.dt):
        raise ValueError(f"filters name layers {sorted(unknown)}; the Mamba layers are {sorted(steps.dt)}")
    return logprobs


def _read_weights(model_path: Path) -> dict[str, torch.Tensor]:
    if (Path(model_path) / "model.safetensors").exists():
        from safetensors.torch import load_file

        stored: dict[str, torch.Tensor] = load_file(Path(model_path) / "model.safetensors")
        return stored
    weights: dict[str, torch.Tensor] = torch.load(Path(model_path) / "pytorch_model.bin", weights_only=True)
    return weights


@torch.no_grad()
def _pure_logprobs(
    model_path: Path, config: dict[str, Any], token_ids: Sequence[int], steps: TimeSteps, dtype: torch.dtype
) -> torch.Tensor:
    weights = {
        name.replace("backbone.embeddings.", "backbone.embedding."): weight.to(dtype)
        for name, weight in _read_weights(model_path).items()
    }
    embedding = weights["backbone.embedding.weight"]
    eps = config.get("layer_norm_epsilon", NORM_EPS)
    dt_rms_eps = config["mixer_rms_eps"] if config.get("model_type") == "falcon_mamba" else None
    ngroups = config.get("n_groups", config.get("ssm_cfg", {}).get("ngroups", 1))

    hidden = embedding[torch.tensor(token_ids)]  # (tokens, d_model)
    for layer in range(config["n_layer"] if "n_layer" in config else config["num_hidden_layers"]):
        prefix = f"backbone.layers.{layer}."
        mixer = {name.removeprefix(prefix + "mixer."): w for name, w in weights.items() if name.startswith(prefix)}
        normed = rms_norm(hidden, weights[prefix + "norm.weight"], eps)
        if "x_proj.weight" in mixer:
            hidden = hidden + mamba1_mixer(normed, mixer, layer, steps, rms_eps=dt_rms_eps)
        else:
            hidden = hidden + mamba2_mixer(normed, mixer, layer, steps, ngroups=ngroups, eps=eps)
    logits = rms_norm(hidden, weights["backbone.norm_f.weight"], eps) @ weights.get("lm_head.weight", embedding).T
    return logits.log_softmax(-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times `weight` where there is one."""
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def causal_conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Depthwise: x (tokens, channels), weight (channels, 1, d_conv); a token sees itself and d_conv - 1 before it."""
    tokens, d_conv = x.shape[0], weight.shape[-1]
    padded = F.pad(x, (0, 0, d_conv - 1, 0))
    y = sum((padded[tap : tap + tokens] * weight[:, 0, tap] for tap in range(d_conv)), torch.zeros_like(x))
    return y if bias is None else y + bias


def mamba1_mixer(
    hidden: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    layer: int,
    steps: TimeSteps,
    *,
    rms_eps: float | None = None,
) -> torch.Tensor:
    """One Mamba-1 mixer over a whole sequence, from an empty state.

    Args:
        hidden: (tokens, d_model), already normalised.
        weights: named as in a checkpoint, without the prefix of the layer.
        rms_eps: where given, dt (before dt_proj), B and C pass an RMS norm, with weights if the checkpoint has some
            (Jamba) or without (FalconMamba).

    Returns:
        (tokens, d_model)
    """
    d_state = weights["A_log"].shape[1]
    dt_rank = weights["dt_proj.weight"].shape[1]
    xz = F.linear(hidden, weights["in_proj.weight"], weights.get("in_proj.bias"))
    x, z = xz.chunk(2, dim=-1)
    x = F.silu(causal_conv1d(x, weights["conv1d.weight"], weights.get("conv1d.bias")))  # (tokens, d_inner)
    low_rank_dt, B, C = torch.split(x @ weights["x_proj.weight"].T, [dt_rank, d_state, d_state], dim=-1)
    if rms_eps is not None:
        low_rank_dt = rms_norm(low_rank_dt, weights.get("dt_layernorm.weight"), rms_eps)
        B = rms_norm(B, weights.get("b_layernorm.weight"), rms_eps)
        C = rms_norm(C, weights.get("c_layernorm.weight"), rms_eps)
    dt = F.softplus(low_rank_dt @ weights["dt_proj.weight"].T + weights["dt_proj.bias"])  # (tokens, d_inner)
    dt = dt.masked_fill(steps.is_filtered(layer, dt), 0.0)

    A = -weights["A_log"].exp()  # (d_inner, d_state)
    state = torch.zeros_like(A)
    y = torch.empty_like(x)
    for t in range(x.shape[0]):
        state = (dt[t, :, None] * A).exp() * state + (dt[t] * x[t])[:, None] * B[t]
        y[t] = state @ C[t]
    y = (y + weights["D"] * x) * F.silu(z)
    return F.linear(y, weights["out_proj.weight"], weights.get("out_proj.bias"))


def mamba2_mixer(
    hidden: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    layer: int,
    steps: TimeSteps,
    *,
    ngroups: int = 1,
    eps: float = NORM_EPS,
) -> torch.Tensor:
    """One Mamba-2 mixer over a whole sequence, from an empty state; arguments and result as for `mamba1_mixer`.

    Args:
        ngroups: groups of heads that share B and C, and over which the gated norm is taken.
        eps: of the gated norm.
    """
    tokens = hidden.shape[0]
    nheads, d_inner = weights["A_log"].shape[0], weights["norm.weight"].shape[0]
    headdim = d_inner // nheads
    conv_dim = weights["conv1d.weight"].shape[0]
    d_state = (conv_dim - d_inner) // (2 * ngroups)
    zxbcdt = F.linear(hidden, weights["in_proj.weight"], weights.get("in_proj.bias"))
    z, xBC, raw_dt = torch.split(zxbcdt, [d_inner, conv_dim, nheads], dim=-1)
    xBC = F.silu(causal_conv1d(xBC, weights["conv1d.weight"], weights.get("conv1d.bias")))
    x, B, C = torch.split(xBC, [d_inner, ngroups * d_state, ngroups * d_state], dim=-1)
    x = x.reshape(tokens, nheads, headdim)
    B = B.reshape(tokens, ngroups, d_state).repeat_interleave(nheads // ngroups, dim=1)  # (tokens, nheads, d_state)
    C = C.reshape(tokens, ngroups, d_state).repeat_interleave(nheads // ngroups, dim=1)
    dt = F.softplus(raw_dt + weights["dt_bias"])  # (tokens, nheads)
    dt = dt.masked_fill(steps.is_filtered(layer, dt), 0.0)

    decay = (-weights["A_log"].exp() * dt).exp()
    state = x.new_zeros(nheads, headdim, d_state)
    y = torch.empty_like(x)
    for t in range(tokens):
        state = decay[t, :, None, None] * state + (dt[t, :, None] * x[t])[:, :, None] * B[t, :, None, :]
        y[t] = (state * C[t, :, None, :]).sum(-1)
    y = (y + weights["D"][:, None] * x).reshape(tokens, d_inner) * F.silu(z)
    y = rms_norm(y.reshape(tokens, ngroups, -1), None, eps).reshape(tokens, d_inner) * weights["norm.weight"]
    return F.linear(y, weights["out_proj.weight"], weights.get("out_proj.bias"))


@torch.no_grad()
def _transformers_logprobs(
    model_path: Path, token_ids: Sequence[int], steps: TimeSteps, dtype: torch.dtype, *, own_mamba1: bool
) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=dtype, local_files_only=True, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    for name, mixer in model.named_modules():
        if not hasattr(mixer, "A_log"):
            continue
        match = re.search(r"layers\.(\d+)\.", name)
        if match is None:
            raise ValueError(f"no layer index in {name!r}")
        layer = int(match[1])
        if hasattr(mixer, "dt_bias"):
            mixer.in_proj.register_forward_hook(_raw_dt_hook(mixer, layer, steps))
            # Some families clamp dt from below, which vLLM does not do, and which would undo the filter.
            mixer.time_step_limit = (0.0, float("inf"))
        elif own_mamba1:
            mixer.forward = _own_mamba1_forward(mixer, layer, steps)
    logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    logprobs: torch.Tensor = logits.to(dtype).log_softmax(-1)
    return logprobs


def _raw_dt_hook(mixer: Any, layer: int, steps: TimeSteps) -> Callable[..., torch.Tensor]:
    """A hook on a Mamba-2 in_proj, whose last nheads columns are the raw dt: filtered tokens get -inf, so dt = 0."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        nheads = mixer.dt_bias.shape[0]
        raw_dt = output[0, :, -nheads:]
        # Falcon-H1 scales in_proj's output afterwards.
        scale = mixer.mup_vector.flatten()[-nheads:] if hasattr(mixer, "mup_vector") else 1.0
        dt = F.softplus(raw_dt * scale + mixer.dt_bias)
        filtered = raw_dt.masked_fill(steps.is_filtered(layer, dt), -torch.inf)
        return torch.cat([output[..., :-nheads], filtered[None]], dim=-1)

    return hook


def _own_mamba1_forward(mixer: Any, layer: int, steps: TimeSteps) -> Callable[..., torch.Tensor]:
    """Replaces a transformers Mamba-1 mixer: its forward offers no place to change dt from outside."""
    weights = {name: weight.detach() for name, weight in mixer.named_parameters()}
    b_norm = getattr(mixer, "b_layernorm", None)
    rms_eps = None if b_norm is None else getattr(b_norm, "variance_epsilon", getattr(b_norm, "eps", None))

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return mamba1_mixer(hidden_states[0], weights, layer, steps, rms_eps=rms_eps)[None]

    return forward
