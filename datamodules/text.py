"""Language modelling on token shards, read in an order that resumes exactly on any number of ranks."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from jaxtyping import Int64
from lightning.pytorch import Callback

from datamodules.base import StreamDataModule
from datamodules.baselines import baselines
from datamodules.fetch import copies_folder, is_address
from datamodules.order import Int64Array, shuffled
from datamodules.prepare.preparation import prepare
from datamodules.prepare.presets import plan_preset
from datamodules.ranges import check_range
from datamodules.shards import MANIFEST, MEMBER_TOKENS, Manifest, ShardError, TokenReader, fetch_manifest
from datamodules.stream import IGNORE_INDEX, Batch, Rows, Samples, widen
from datamodules.tokenizers import ByteTokenizer, Tokenizer, from_description

# Blocks are shuffled among so many places of the corpus at a time, of one member each. With 64 Ki tokens a member these
# are 64 Mi tokens: more than a shuffle buffer holds, and little enough for the page cache of any machine.
_WINDOW_GROUPS = 1024


class TextBlocks:
    """Blocks of `context_length` tokens and the token after each: block i starts at token i * context_length.

    Documents follow one another, each ended by the end-of-document token, and blocks cut through them, so a block
    attends across documents. Every token but the first is predicted exactly once per epoch.
    """

    def __init__(
        self,
        reader: TokenReader,
        context_length: int,
        *,
        seed: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        self.reader = reader
        self.context_length = context_length
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.size = max(reader.tokens - 1, 0) // context_length

    def order(self, indices: Int64Array) -> Int64Array:
        if self.seed is None:
            return indices
        group = max(1, MEMBER_TOKENS // self.context_length)
        return shuffled(self.size, self.seed, indices, group=group, window=_WINDOW_GROUPS)

    def read(self, ids: Int64Array) -> Rows:
        """The blocks `ids` (B,) as (B, context_length + 1) tokens of the shards' type, and the rows without one."""
        rows = np.empty((len(ids), self.context_length + 1), dtype=self.reader.dtype)
        problems: list[tuple[int, str]] = []
        for number, (row, block) in enumerate(zip(rows, ids.tolist(), strict=True)):
            try:
                self.reader.read_into(row, block * self.context_length)
            except ShardError as error:
                if not self.skip_unreadable:
                    raise
                row[:] = 0
                problems.append((number, str(error)))
        return {"tokens": rows, "unreadable": problems}

    def expand(self, rows: Rows) -> Batch:
        tokens = rows["tokens"]
        batch: Batch = {"tokens": widen(tokens[:, :-1]), "targets": widen(tokens[:, 1:])}
        for number, _ in rows["unreadable"]:
            batch["targets"][number] = IGNORE_INDEX
        return batch


class TextDataModule(StreamDataModule):
    """Blocks of text from shards in a folder or behind an address.

    Args:
        shards_dir: folder that `python -m datamodules.prepare` wrote, or an http(s)://, s3:// or pipe: address of it, in
            which `{}` stands for the file name if it is there. What is read from an address is copied into the cache
            ($CAUSALRN_CACHE) and read there, in the same order and as exactly resumable as from a folder.
        context_length: tokens per block.
        batch_size: blocks per step over all ranks.
        num_workers: worker processes per rank; the order of blocks does not depend on it.
        seed: chooses the order of the training blocks.
        vocab_size: what the model is built for; must be that of the shards' tokenizer (bytes: 256).
        on_bad_shard: "raise", or "skip" to replace blocks that cannot be read by ignored ones, and count them.
        corpus: a corpus that ships with the package, prepared into `shards_dir` if nothing is there.
    """

    kind = "text"

    def __init__(
        self,
        shards_dir: str,
        context_length: int = 256,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        vocab_size: int = 256,
        on_bad_shard: Literal["raise", "skip"] = "raise",
        corpus: Literal["state_of_the_union"] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.save_hyperparameters(logger=False)
        check_range(self, "[1, inf)", context_length=context_length, vocab_size=vocab_size)
        self.shards_dir = shards_dir
        self.context_length = context_length
        self.seed = seed
        self.vocab_size = vocab_size
        self.on_bad_shard = on_bad_shard
        self.corpus = corpus
        self.cache_dir: str | None = None
        self.skipped_samples = 0

    @property
    def url(self) -> str | None:
        """The address of the shards, if they have one."""
        return self.shards_dir if is_address(self.shards_dir) else None

    @property
    def folder(self) -> Path:
        """The folder of the shards, or of the copies of those that were read from an address."""
        return Path(self.shards_dir) if self.url is None else copies_folder(self.url, self.cache_dir)

    @functools.cached_property
    def manifest(self) -> Manifest:
        """The manifest of the shards, checked against `vocab_size`."""
        manifest = Manifest.load(self.folder)
        if manifest.vocab_size != self.vocab_size:
            raise ShardError(
                f"{self.shards_dir}/{MANIFEST}: the tokenizer ({manifest.tokenizer['kind']}) has "
                f"{manifest.vocab_size} tokens, and vocab_size is {self.vocab_size}"
            )
        return manifest

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        try:
            return from_description(self.manifest.tokenizer)
        except ValueError as error:
            raise ShardError(f"{self.shards_dir}/{MANIFEST}: {error}") from error

    @functools.cached_property
    def token_bytes(self) -> Int64[torch.Tensor, " V"]:
        """Bytes of text that each token stands for: what bits per byte are counted by."""
        return torch.from_numpy(self.tokenizer.token_bytes())

    @property
    def max_length(self) -> int:
        return self.context_length

    def describe_tokenizer(self) -> dict[str, Any]:
        """What the manifest says.

        Raises:
            ShardError: there is no manifest, as before `prepare_data` has copied that of an address or prepared a corpus.
        """
        return self.manifest.tokenizer

    @property
    def val_names(self) -> list[str]:
        return ["text"]

    def prepare_data(self) -> None:
        if self.url is not None:
            fetch_manifest(self.url, self.folder)
        elif self.corpus is not None and not (self.folder / MANIFEST).exists():
            plan = plan_preset(self.corpus, ByteTokenizer().describe())
            prepare(plan, self.folder, wait_for_other=True)

    def on_rows(self, rows: Rows) -> None:
        for _, problem in rows["unreadable"]:
            if not self.skipped_samples:
                warnings.warn(f"{problem}; its blocks are left out and counted", stacklevel=2)
            self.skipped_samples += 1

    def setup(self, stage: str) -> None:
        if self.on_bad_shard == "skip" and self.trainer is not None:
            callbacks: list[Callback] = self.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
            if not any(isinstance(callback, SkippedSamples) for callback in callbacks):
                callbacks.append(SkippedSamples())
        # The manifest is read here, so that a faulty folder is refused before anything is built.
        _ = self.manifest

    def baselines(self) -> dict[str, float]:
        """Bits per byte of methods without a network on the bytes that this trainer validates on; empty if on none.

        It is empty too, after a warning, where a shard cannot be read: a trained network is worth more than a comparison.
        """
        if self.trainer is not None and not self.trainer.limit_val_batches:  # pyright: ignore[reportAttributeAccessIssue]
            return {}
        try:
            size = self._blocks("val", None).size
            if self.trainer is not None and self.trainer.num_val_batches:
                size = min(size, int(self.trainer.num_val_batches[0]) * self.batch_size)
            return baselines(self.folder, size * self.context_length + 1, self.url)
        except ShardError as error:
            warnings.warn(f"no baselines: {error}", stacklevel=2)
            return {}

    def identity(self) -> dict[str, Any]:
        return {
            "task": "text",
            "seed": self.seed,
            "context_length": self.context_length,
            "tokenizer": self.manifest.tokenizer,
            "shards": self.manifest.fingerprint,
        }

    def train_samples(self) -> TextBlocks:
        return self._blocks("train", self.seed)

    def batches_per_epoch(self) -> int:
        blocks = self.train_samples().size
        if blocks < self.batch_size:
            raise ShardError(
                f"{self.shards_dir}: the train split has {blocks} blocks of {self.context_length} tokens, fewer than "
                f"the batch_size of {self.batch_size}"
            )
        return blocks // self.batch_size

    def eval_samples(self, split: str) -> Sequence[tuple[Samples, int]]:
        blocks = self._blocks(split, None)
        return [(blocks, blocks.size)]

    @property
    def training_lengths(self) -> tuple[int, int]:
        return self.context_length, self.context_length

    def positions(self, length: int) -> int:
        return length

    def length_samples(self, split: str, length: int) -> tuple[Samples, int | None]:
        """Blocks of another context length."""
        blocks = self._blocks(split, None, length)
        return blocks, blocks.size

    def _blocks(self, split: str, seed: int | None, context_length: int | None = None) -> TextBlocks:
        context_length = self.context_length if context_length is None else context_length
        blocks = TextBlocks(
            TokenReader(self.folder, self.manifest, split, self.url),
            context_length,
            seed=seed,
            skip_unreadable=self.on_bad_shard == "skip",
        )
        if not blocks.size:
            way_out = "; limit_val_batches=0 trains without validation" if split == "val" else ""
            raise ShardError(
                f"{self.shards_dir}: the {split} split has {blocks.reader.tokens} tokens, too few for one block of "
                f"{context_length}{way_out}"
            )
        return blocks


class SkippedSamples(Callback):
    """Logs `data/skipped_samples`, summed over the ranks, whenever the Trainer logs.

    A text DataModule with `on_bad_shard: skip` adds it to its Trainer by itself.
    """

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        # Every rank counts its own, and all come here at the same steps, as the reduction needs.
        every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and trainer.global_step % every == 0:
            count = float(trainer.datamodule.skipped_samples)  # pyright: ignore[reportAttributeAccessIssue]
            pl_module.log("data/skipped_samples", count, sync_dist=True, reduce_fx="sum")
