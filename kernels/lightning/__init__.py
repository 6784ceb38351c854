"""Lightning attention: linear attention with exponential decay."""
