"""Synthetic tasks, and the DataModule that streams any of them."""
