"""The elementwise product of SGLU."""
