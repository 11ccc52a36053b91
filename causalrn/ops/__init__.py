"""Relation operators: `relation_quadratic`, `relation_linear` and `relation_linear_step`, with their definitions."""
