"""RULER and LongBench-E through lm-eval (EleutherAI's lm-evaluation-harness) and its vLLM backend; needs lm-eval."""
