"""Data of CausalRN: synthetic tasks, text shards and the exact, elastic order in which training reads them."""
