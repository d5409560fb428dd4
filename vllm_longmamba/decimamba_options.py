"""What a user can set for DeciMamba: `--additional-config '{"decimamba": {...}}'`, as one typed object."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vllm_longmamba.options import options_given

KEY = "decimamba"
SCORES = ("mean", "norm")
# What the configurations of DeciMamba's authors all have.
MIN_TOKENS = 20


@dataclass(frozen=True)
class DeciMambaOptions:
    """Options of a DeciMamba engine.

    Attributes:
        layers: the decimating layers, counted from 0, ascending. None: the published ones of the model.
        L_base: tokens of a prompt that the first of them keeps, beside the last. Shorter prompts lose nothing in any
            layer. None: the published number of the model.
        beta: share of them that each further one keeps, in (0, 1].
        min_tokens: no layer keeps fewer.
        score: the tokens of the largest "mean" of dt over the channels are kept, as in the paper, or of the largest
            "norm", as in its authors' code.
        cut_prompts: a prompt longer than a step is cut, and each part keeps its share of tokens. Which ones then
            depends on the cuts. False: a prompt is one step, and tokens are chosen over all of it.
    """

    layers: tuple[int, ...] | None = None
    L_base: int | None = None
    beta: float = 1.0
    min_tokens: int = MIN_TOKENS
    score: str = "mean"
    cut_prompts: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None:
            layers = self.layers
            is_list = isinstance(layers, list | tuple) and all(_is_int(layer, 0) for layer in layers)
            if not is_list or not layers or list(layers) != sorted(set(layers)):
                raise _wrong("layers", "layer numbers from 0, ascending, at least one", layers)
            object.__setattr__(self, "layers", tuple(layers))
        if self.L_base is not None and not _is_int(self.L_base, 1):
            raise _wrong("L_base", "a positive number of tokens", self.L_base)
        if not isinstance(self.beta, int | float) or isinstance(self.beta, bool) or not 0.0 < self.beta <= 1.0:
            raise _wrong("beta", "a number above 0 and up to 1", self.beta)
        if not _is_int(self.min_tokens, 0):
            raise _wrong("min_tokens", "a number of tokens, 0 or more", self.min_tokens)
        if self.score not in SCORES:
            raise _wrong("score", " or ".join(f'"{score}"' for score in SCORES), self.score)
        if not isinstance(self.cut_prompts, bool):
            raise _wrong("cut_prompts", "true or false", self.cut_prompts)

    def with_defaults(self, published: dict[str, Any]) -> "DeciMambaOptions":
        """The same, with the published settings of the model where nothing was given."""
        missing = {name: value for name, value in published.items() if getattr(self, name) is None}
        return replace(self, **missing)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values that `options_from_config` reads back."""
        return asdict(self) | {"layers": None if self.layers is None else list(self.layers)}

    def tokens_kept(self) -> list[int]:
        """How many tokens each decimating layer keeps (the paper's P_s), beside the last one of the prompt."""
        assert self.layers is not None
        assert self.L_base is not None
        return [max(int(self.L_base * self.beta**number), self.min_tokens) for number in range(len(self.layers))]

    def is_decimated(self, prompt_length: Any) -> Any:
        """Whether a prompt of this many tokens loses any; for numbers and arrays of numpy."""
        return prompt_length > self.tokens_kept()[0] + 1


def options_from_config(additional_config: Any) -> DeciMambaOptions:
    """Parse the "decimamba" entry of vLLM's additional config.

    Args:
        additional_config: `VllmConfig.additional_config`, a dict or None.

    Returns:
        The options, defaults where the entry is missing.

    Raises:
        ValueError: an unknown option, or a value of the wrong type or range.
    """
    return DeciMambaOptions(**options_given(additional_config, KEY, [field.name for field in fields(DeciMambaOptions)]))


def _is_int(value: Any, least: int) -> bool:
    # bool is an int in Python, but true is not a number of tokens.
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _wrong(name: str, rule: str, value: Any) -> ValueError:
    return ValueError(f"additional_config[{KEY!r}]: {name} must be {rule}, but is {value!r}")
