"""How closed_loop_research.py names its methods: a kind and settings, `closed:theta=0.05,combine=min`."""

from typing import Any

DEFAULTS = {
    "theta": 0.01,  # retention above which a channel is global
    "n": 6,  # sequences; the first six are the same for every n
    "combine": "median",
    "joint": 0,  # 1: all sequences go through a layer under its combined threshold
    "scale": 1.0,  # of the budget
    "power": 0.0,  # of S/L, another factor of the budget
    "clamp": 0.0,  # per cent; budget and dt are clamped as in the paper
    "C": -1.0,  # per cent, of the paper's thresholds; negative takes the paper's for this kind of model
    "soft": 0.0,  # factor of a filtered token's dt
    "rule": "alone",  # "max": no lower than the paper's threshold; "min": no higher
    "seed": 0,  # chooses the sequences
}
# Of the methods that scale dt or A by factor * (L/S)^power in prompts of S tokens; theta 0 means all channels.
SCALE_DEFAULTS = {"theta": 0.0, "factor": 1.0, "power": 0.0}
SETTINGS = {
    "plain": {},
    "paper": DEFAULTS,
    "closed": DEFAULTS,
    "prompt": DEFAULTS,
    "dt": SCALE_DEFAULTS,
    "A": SCALE_DEFAULTS,
}


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """A method's kind and settings: `closed:theta=0.05,combine=min`."""
    kind, _, settings = name.partition(":")
    if kind not in SETTINGS:
        raise SystemExit(f"unknown method {name!r}; there are {', '.join(SETTINGS)}")
    spec: dict[str, Any] = dict(SETTINGS[kind])
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if key not in spec:
            raise SystemExit(f"method {name!r}: unknown setting {key!r}; settings of {kind} are {', '.join(spec)}")
        spec[key] = value if isinstance(spec[key], str) else type(spec[key])(value)
    return kind, spec
