"""SimpleRMSNorm, fused with residual additions."""
