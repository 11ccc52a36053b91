"""The operators. Their definitions stand in `reference`, their kernels in `quadratic`, `linear` and files of their names."""

from causalrn.ops.linear.operator import relation_linear as relation_linear
from causalrn.ops.linear.operator import relation_linear_step as relation_linear_step
from causalrn.ops.normalisation import normalise as normalise
from causalrn.ops.pairs import PairRule as PairRule
from causalrn.ops.pairs import PairTerms as PairTerms
from causalrn.ops.quadratic.operator import relation_quadratic as relation_quadratic
from causalrn.ops.quadratic.operator import relation_quadratic_shifted as relation_quadratic_shifted
from causalrn.ops.quadratic.step import relation_quadratic_step as relation_quadratic_step
from causalrn.ops.weight_only import stored_linear as stored_linear
