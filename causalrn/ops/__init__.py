"""Relation operators: `relation_quadratic`, `relation_linear` and `relation_linear_step`, with their definitions."""

from causalrn.ops.linear import relation_linear as relation_linear
from causalrn.ops.linear import relation_linear_step as relation_linear_step
from causalrn.ops.quadratic import relation_quadratic as relation_quadratic
