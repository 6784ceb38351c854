"""The matrix products of a linear layer, in bf16, fp32 and fp8, and fp32 sums of weight gradients."""
