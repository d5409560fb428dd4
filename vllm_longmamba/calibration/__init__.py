"""Makes threshold tables: real text through the running model, at an engine's start or by `longmamba calibrate`."""
