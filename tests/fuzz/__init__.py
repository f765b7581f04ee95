"""Fuzzing of everything that reads a file from outside; see docs/measurements/fuzz.md."""
