"""Memory, traffic and time of a layout before a run starts; search for a layout; dry runs on fake tensors."""
