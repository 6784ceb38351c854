"""Whether cleaning pays: raw and cleaned corpora of one size, for `launch.ablation` to train equal models on."""
