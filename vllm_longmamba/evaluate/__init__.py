"""What LongMamba does for a model, measured through the real engine: hidden numbers, perplexity, tuning."""
