"""Chat templates that come with the package.

`PASS_THROUGH` is for base models, which have none, behind /v1/chat/completions and in batch files: the prompt is the
content of the messages, one after another, and nothing else. Its path for a command line:

    python -m vllm_longmamba.chat_templates
"""

from pathlib import Path

PASS_THROUGH = Path(__file__).parent / "pass_through.jinja"
