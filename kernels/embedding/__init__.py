"""The scaled embedding lookup."""
