"""Engines: how parameters, gradients and optimizer state are sharded over data-parallel ranks. build.py selects."""
