"""Sampling of each row's next token from its logits."""
