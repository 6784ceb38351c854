"""Cross-entropy of the output head without a tensor of all logits."""
