"""Optimizers (AdamW, Muon) behind one protocol, parameter groups, and schedules of learning rate and batch size."""
