"""What every rank of `run_ranks` needs, imported once in the fork server: a rank then starts in a tenth of a second."""

import megatron_tn.checkpoint.load
import megatron_tn.checkpoint.save
import megatron_tn.engine.build
import megatron_tn.engine.deepspeed
import megatron_tn.train  # noqa: F401
