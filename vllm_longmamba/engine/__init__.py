"""Where vLLM is met: its configuration, its model classes, its model runners and its prefix cache."""
