"""The parts of a training run: start, step, guard, hooks, run folder, watchdog. megatron_tn/train.py has the loop."""
