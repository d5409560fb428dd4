"""Puts the torch reference on the path."""

from vllm_longmamba.evaluate.reference_models import reference_module

reference_module()
