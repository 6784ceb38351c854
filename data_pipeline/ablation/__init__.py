"""Data ablation of the cleaning rules: raw and cleaned corpora of equal size, on which `launch.ablation` trains."""
