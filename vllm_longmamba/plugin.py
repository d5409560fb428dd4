"""Entry point of the plugin: vLLM calls `register` in every one of its processes.

vLLM swallows an exception raised while it imports this module (the user would silently get plain Mamba), but stops
on one raised inside `register`. So nothing but the standard library is imported at module level.
"""


def register() -> None:
    """Make `--model-impl longmamba` known to vLLM. Calling it again changes nothing.

    Raises:
        IncompatibleVllmError: this vLLM is too old, or lacks a function that the plugin patches.
    """
    from vllm_longmamba.compatibility import check_vllm_version

    check_vllm_version()

    from vllm_longmamba.checkpoint.original_config import register_config_parser
    from vllm_longmamba.engine.patches import apply_patches
    from vllm_longmamba.engine.registration import register_architectures

    apply_patches()
    register_config_parser()
    register_architectures()
