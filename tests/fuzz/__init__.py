"""Fuzzing of everything that reads files or states: `python -m tests.fuzz --help`."""
