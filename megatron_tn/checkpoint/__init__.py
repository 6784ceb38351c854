"""Checkpoints: format, saving, loading into any layout, verification, removal of old ones."""
