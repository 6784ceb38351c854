"""The elementwise parts of Muon's update."""
