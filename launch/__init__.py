"""Command lines around training: SLURM jobs, status, reports, comparisons, the demo, the soak, plans of runs."""
