"""Lightning strategies: parameters sharded by FSDP2 or DeepSpeed, and one sequence over all ranks."""

from causalrn.strategies.checks import check_run
from causalrn.strategies.fully_sharded import FullyShardedStrategy
from causalrn.strategies.sequence import SequenceParallelStrategy
from causalrn.strategies.whole import whole_network
from causalrn.strategies.zero import ZeroStrategy

__all__ = ["FullyShardedStrategy", "SequenceParallelStrategy", "ZeroStrategy", "check_run", "whole_network"]
