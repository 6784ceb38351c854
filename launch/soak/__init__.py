"""Training under faults: what can be done to a run (faults.py), what must then be true of it (check.py), and `make
soak` (__main__.py), which does the one at random and checks the other."""
