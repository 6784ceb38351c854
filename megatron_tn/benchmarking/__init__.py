"""The parts of `python -m megatron_tn.benchmark`: timing, models under test, result rows."""
