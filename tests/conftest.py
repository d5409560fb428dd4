"""Settings of every test: offline, a small cache, the engine in the test's own process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# One process: no start-up cost per engine, and errors reach the test as they are.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
