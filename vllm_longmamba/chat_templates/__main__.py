"""Prints the path of the pass-through chat template."""

from vllm_longmamba.chat_templates import PASS_THROUGH

print(PASS_THROUGH)
