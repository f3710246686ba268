"""The checks of tests/gpu/run.py: each module has a list CASES of (name, seconds at most, function of a Context)."""
