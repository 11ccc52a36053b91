"""Token shards behind http(s), s3 and pipe: addresses through the webdataset pipeline; not exactly resumable."""

import hashlib
import http.client
import io
import random
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, IterableDataset
from webdataset import filters
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import split_by_worker
from webdataset.tariterators import tar_file_expander

from datamodules.prepare.downloads import cache_folder
from datamodules.remote_files import download, fetch, join_url, open_url
from datamodules.shards import MANIFEST, Manifest, Shard, ShardError
from datamodules.stream import Batch, Rank, as_it_is, ignore_signals, iterate, widen
from datamodules.text import TextDataModule

# Blocks that a worker shuffles among: those of 64 members and more, so of several shards' worth of documents.
_SHUFFLE_BLOCKS = 4096


class _EndlessShards(IterableDataset[dict[str, Any]]):
    """The shards of a split for ever, in another order each time round, the same on every rank and worker."""

    def __init__(self, shards: list[Shard], key: str) -> None:
        self.shards = shards
        self.key = key

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = random.Random(self.key)
        while True:
            for shard in order.sample(self.shards, len(self.shards)):
                yield {"shard": shard}


class RemoteBlocks:
    """The webdataset pipeline of one rank: shards split by rank and worker, checked, cut into blocks, shuffled.

    Ranks and workers take turns along one endless order of shards, so there may be fewer shards than of them. Each
    has its own shuffle buffer: which blocks a step sees depends on the number of ranks and workers.
    """

    def __init__(
        self, url: str, manifest: Manifest, context_length: int, rank: Rank, key: str, cache: Path | None
    ) -> None:
        self.url = url
        self.manifest = manifest
        self.context_length = context_length
        self.rank = rank
        self.key = key
        self.cache = cache

    def pipeline(self, batch_size: int) -> DataPipeline:
        """Endless arrays (batch_size, context_length + 1) of the shards' type."""
        return DataPipeline(
            _EndlessShards(self.manifest.splits["train"].shards, self.key),
            self._split_by_rank,
            split_by_worker,
            self._open,
            tar_file_expander,
            self._members,
            self._blocks,
            filters.shuffle(
                _SHUFFLE_BLOCKS, initial=_SHUFFLE_BLOCKS // 4, seed=zlib.crc32(self.key.encode())
            ),
            filters.batched(batch_size, collation_fn=np.stack, partial=False),
        )

    def _split_by_rank(self, source: Iterable[Any]) -> Iterator[Any]:
        for number, item in enumerate(source):
            if number % self.rank.world_size == self.rank.rank:
                yield item

    def _open(self, source: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for item in source:
            shard = item["shard"]
            url = join_url(self.url, shard.name)
            if self.cache is None:
                with open_url(url) as stream:
                    yield {"url": shard.name, "stream": stream}
                continue
            with fetch(url, self.cache, shard).open("rb") as stream:
                yield {"url": shard.name, "stream": stream}

    def _members(self, source: Iterable[dict[str, Any]]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Tokens of each member with its number; every one that the manifest lists is there and unharmed."""
        shards = {shard.name: shard for shard in self.manifest.splits["train"].shards}
        expected = 0
        shard: Shard | None = None
        for item in _naming_the_shard(source, self.url):
            # webdataset marks the end of a shard by an empty item.
            if not item:
                if shard is not None and expected != len(shard.crc32):
                    raise ShardError(f"shard {self._place(shard)} is truncated at member {expected}")
                expected, shard = 0, None
                continue
            shard = shards[item["__url__"]]
            tokens = np.load(io.BytesIO(item["data"]), allow_pickle=False)
            if expected >= len(shard.crc32) or zlib.crc32(tokens.data) != shard.crc32[expected]:
                raise ShardError(f"shard {self._place(shard)} is damaged at member {expected}")
            yield expected, tokens
            expected += 1

    def _place(self, shard: Shard) -> str:
        """Where a shard was read from, for messages: a damaged copy must be found to be deleted."""
        url = join_url(self.url, shard.name)
        return url if self.cache is None else f"{self.cache / shard.name} (copy of {url})"

    def _blocks(self, source: Iterable[tuple[int, npt.NDArray[Any]]]) -> Iterator[npt.NDArray[Any]]:
        size = self.context_length
        kept = np.empty(0, dtype=self.manifest.dtype)
        for number, tokens in source:
            # A new shard does not continue the text of the one before.
            tokens = tokens if number == 0 else np.concatenate([kept, tokens])
            count = max(len(tokens) - 1, 0) // size
            for start in range(0, count * size, size):
                yield tokens[start : start + size + 1]
            kept = tokens[count * size :]


def _naming_the_shard(source: Iterable[dict[str, Any]], url: str) -> Iterator[dict[str, Any]]:
    try:
        yield from source
    except (OSError, tarfile.TarError, http.client.HTTPException) as error:
        # webdataset appends the stream and the shard's name to the arguments.
        name = str(error.args[-1]) if error.args else "?"
        raise ShardError(f"cannot read shard {join_url(url, name)}: {error.args[0]}") from None


class RemoteLoader:
    """Endless batches of a rank with a nominal length; the workers go on from one pass to the next."""

    def __init__(
        self, blocks: RemoteBlocks, batch_size: int, batches_per_epoch: int, num_workers: int
    ) -> None:
        self.blocks = blocks
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.num_workers = num_workers
        self._batches: Iterator[npt.NDArray[Any]] | None = None

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            # Batches travel as arrays: tensors would take the slower way through shared memory.
            pipeline: Any = self.blocks.pipeline(self.batch_size)
            loader = DataLoader(
                pipeline,
                batch_size=None,
                num_workers=self.num_workers,
                collate_fn=as_it_is,
                worker_init_fn=ignore_signals,
            )
            self._batches = iterate(loader)
        for _ in range(self.batches_per_epoch):
            try:
                array = next(self._batches)
            except ShardError as error:
                # Without the traceback that the DataLoader puts before a worker's message.
                raise ShardError(str(error).strip().rpartition("ShardError: ")[2]) from None
            yield {"tokens": widen(array[:, :-1]), "targets": widen(array[:, 1:])}


class RemoteTextDataModule(TextDataModule):
    """Blocks of text from shards behind an address, for corpora that no local disk holds.

    Training streams through webdataset and is **not exactly resumable**: a resumed run goes on with shards in a new
    order, so it repeats some samples and misses others within the epoch. Validation and test shards are downloaded,
    checked and read like local ones.

    Args:
        shards_url: http(s)://, s3:// or pipe: address of the folder; `{}` stands for the file name if it is there.
        context_length: tokens per block.
        batch_size: blocks per step over all ranks.
        num_workers: worker processes per rank.
        seed: chooses the order of shards and blocks.
        vocab_size: what the model is built for; must be that of the shards' tokenizer.
        cache_dir: local folder for what is downloaded; in the user's cache folder by default.
        keep_train_shards: keep each training shard in `cache_dir`, rather than stream it every time.
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
        folder = Path(cache_dir) if cache_dir is not None else cache_folder() / "remote"
        # One folder per address, so that two corpora never mix.
        folder = folder / hashlib.sha256(shards_url.encode()).hexdigest()[:16]
        super().__init__(str(folder), context_length, batch_size, num_workers, seed, vocab_size)
        self.save_hyperparameters(logger=False)
        self.shards_url = shards_url
        self.keep_train_shards = keep_train_shards
        self.resumes = 0

    def prepare_data(self) -> None:
        folder = Path(self.shards_dir)
        download(join_url(self.shards_url, MANIFEST), folder / MANIFEST)
        manifest = Manifest.load(folder)
        for split in ("val", "test"):
            for shard in manifest.splits[split].shards:
                fetch(join_url(self.shards_url, shard.name), folder, shard)

    def train_dataloader(self) -> RemoteLoader:  # pyright: ignore[reportIncompatibleMethodOverride]
        rank = self._rank()
        if self.batch_size % rank.world_size:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by {rank.world_size} ranks")
        key = f"{self.seed}/{self.resumes}"
        cache = Path(self.shards_dir) if self.keep_train_shards else None
        blocks = RemoteBlocks(self.shards_url, self.manifest, self.context_length, rank, key, cache)
        return RemoteLoader(
            blocks, self.batch_size // rank.world_size, self.batches_per_pass(), self.num_workers
        )

    def baselines(self) -> dict[str, float]:
        """Nothing unless every training shard lies in the cache folder by now: they are not fetched for it."""
        shards = self.manifest.splits["train"].shards
        here = all((Path(self.shards_dir) / shard.name).exists() for shard in shards)
        return super().baselines() if here else {}

    def state_dict(self) -> dict[str, Any]:
        return {**self.identity(), "resumes": self.resumes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_identity(state_dict)
        # Another order than before: the beginning of the old one has been seen.
        self.resumes = state_dict["resumes"] + 1
