"""Runs of docs/results.md: a plan of runs (run_plan.py), one of them (planned_run.py), all of them side by side on GPUs
(__main__.py), and the time to a loss that is read from their curves (time_to_loss.py)."""
