"""Prepares shards of tokens from text, JSON lines, parquet, tar files and standard corpora."""
