"""Whether cleaning pays: raw and cleaned corpora of one size, for `launch.worth` to train equal models on."""
