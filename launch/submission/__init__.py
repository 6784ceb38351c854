"""The parts of launch.submit: checks.py finds problems, script.py writes the job's script, provenance.py tells the
code's revision and packages."""
