"""Sweeps: a grid of runs, each an ordinary run folder, and the table of their results."""
