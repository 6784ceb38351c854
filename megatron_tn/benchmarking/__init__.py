"""The parts of `python -m megatron_tn.benchmark`: clocks, models under test, and the rows that come out."""
