"""Held-out loss, lm-evaluation-harness tasks, document scores, and texts generated during training."""
