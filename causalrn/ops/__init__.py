"""The operators: `relation_quadratic`, `relation_quadratic_shifted`, `relation_linear`, `relation_linear_step` and `normalise`."""

from causalrn.ops.linear.operator import relation_linear as relation_linear
from causalrn.ops.linear.operator import relation_linear_step as relation_linear_step
from causalrn.ops.normalisation import normalise as normalise
from causalrn.ops.quadratic.operator import relation_quadratic as relation_quadratic
from causalrn.ops.quadratic.operator import relation_quadratic_shifted as relation_quadratic_shifted
