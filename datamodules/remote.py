"""The former DataModule of remote shards, for configs and checkpoints that name it: TextDataModule takes addresses itself."""

import warnings
from typing import Any

from datamodules.text import TextDataModule


class RemoteTextDataModule(TextDataModule):
    """TextDataModule under its former name for shards behind an address.

    Args:
        shards_url: what TextDataModule calls `shards_dir`.
        context_length, batch_size, num_workers, seed, vocab_size: as of TextDataModule.
        cache_dir: folder of the copies; in $CAUSALRN_CACHE by default.
        keep_train_shards: without effect; every shard that is read is kept.
    """

    def __init__(
        self,
        shards_url: str,
        context_length: int = 256,
        batch_size: int = 32,
        num_workers: int = 1,
        seed: int = 0,
        vocab_size: int = 256,
        cache_dir: str | None = None,
        keep_train_shards: bool = True,
    ) -> None:
        super().__init__(shards_url, context_length, batch_size, num_workers, seed, vocab_size)
        self.save_hyperparameters(logger=False)
        self.cache_dir = cache_dir
        if not keep_train_shards:
            warnings.warn("keep_train_shards has no effect: shards are read from their copies", stacklevel=2)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "next_index" in state_dict:
            super().load_state_dict(state_dict)
            return
        # Shards once passed through a shuffle buffer, whose place no checkpoint recorded.
        self.check_identity(state_dict)
        warnings.warn(
            "the checkpoint does not tell which samples its run has seen: training begins at the first of the order",
            stacklevel=2,
        )
