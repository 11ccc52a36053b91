"""Relation operators: `relation_quadratic`, `relation_linear` and `relation_linear_step`, with their definitions."""

from causalrn.ops.quadratic import relation_quadratic as relation_quadratic
