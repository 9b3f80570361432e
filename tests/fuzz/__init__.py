"""Fuzzing of everything that reads bytes: one table of targets, the ways to change files, and a run with coverage."""
