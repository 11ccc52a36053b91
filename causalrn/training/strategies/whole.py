"""A network whose parameters lie sharded over the ranks, put together on rank 0 to be used outside of training."""

import lightning as L
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from causalrn.models import LanguageModel, build, describe


def whole_network(module: L.LightningModule) -> LanguageModel | None:
    """The network on rank 0, None on the others; where its parameters are sharded, a copy, and all ranks must call.

    Args:
        module: with `network` and, as `description`, what rebuilds a sharded one.
    """
    network = module.network
    assert isinstance(network, LanguageModel)
    is_first = module.trainer.is_global_zero
    if isinstance(network, FSDPModule):
        weights = get_model_state_dict(
            network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    elif any(hasattr(parameter, "ds_id") for parameter in network.parameters()):
        from deepspeed.runtime.zero import GatheredParameters

        weights = {}
        for name, parameter in network.named_parameters():
            with GatheredParameters([parameter]):
                if is_first:
                    weights[name] = parameter.detach().cpu().clone()
    else:
        return network if is_first else None
    if not is_first:
        return None
    copy = build(module.description or describe(network))  # pyright: ignore[reportArgumentType]
    assert isinstance(copy, LanguageModel)
    copy.load_state_dict(weights)
    return copy.to(module.device)
