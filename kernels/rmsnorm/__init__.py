"""RMSNorm with a learnt weight, fused with the residual addition."""
