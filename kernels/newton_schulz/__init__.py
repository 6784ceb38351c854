"""The Newton-Schulz iteration of Muon's update."""
