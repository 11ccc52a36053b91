"""Measures a network, without Lightning: metrics, lengths beyond training, the pairs of its relations."""
