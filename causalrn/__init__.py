"""CausalRN: scalable training of the Causal Relation Network (arXiv 2406.16168)."""

__version__ = "0.1.0"
