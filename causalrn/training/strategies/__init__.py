"""Lightning strategies: parameters sharded by FSDP2 or DeepSpeed, and one sequence over all ranks."""

from causalrn.training.strategies.checks import check_run
from causalrn.training.strategies.context_parallel import ContextParallelStrategy
from causalrn.training.strategies.fully_sharded import FullyShardedStrategy
from causalrn.training.strategies.whole import whole_network
from causalrn.training.strategies.zero import ZeroStrategy

__all__ = ["ContextParallelStrategy", "FullyShardedStrategy", "ZeroStrategy", "check_run", "whole_network"]
