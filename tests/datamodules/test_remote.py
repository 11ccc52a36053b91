"""Text behind an address is the text of the folder behind it: the same batches, the same state, and no byte unchecked."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.fetch import copies_folder
from datamodules.remote import RemoteTextDataModule
from datamodules.shards import Manifest, ShardError
from datamodules.text import TextDataModule
from tests.datamodules.server import FolderServer, serving

BLOCK_TOKENS = 8


@pytest.fixture
def server(tmp_path: Path, numbered_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderServer]:
    """Serves a private copy of the numbered shards, in `tmp_path / "served"`."""
    monkeypatch.setenv("CAUSALRN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(numbered_shards, tmp_path / "served")
    with serving(tmp_path / "served") as server:
        yield server


def data_of(location: str, **more: Any) -> TextDataModule:
    data = TextDataModule(location, BLOCK_TOKENS, **{"batch_size": 2, **more})
    data.prepare_data()
    data.setup("fit")
    return data


def batches(data: TextDataModule) -> list[torch.Tensor]:
    loaders = [data.train_dataloader(), data.train_dataloader(), *data.val_dataloader()]
    return [batch[name] for loader in loaders for batch in loader for name in ("tokens", "targets")]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(server: FolderServer, tmp_path: Path, workers: int) -> None:
    local = data_of(str(tmp_path / "served"), num_workers=workers)
    remote = data_of(server.url, num_workers=workers)
    for ours, theirs in zip(batches(remote), batches(local), strict=True):
        assert torch.equal(ours, theirs)
    assert remote.state_dict() == local.state_dict()
    # Each file once, however many workers and passes read it.
    assert set(server.asked.values()) == {1}
    assert set(server.asked) == {path.name for path in (tmp_path / "served").iterdir()}


def test_a_command_serves_as_well(server: FolderServer, tmp_path: Path) -> None:
    remote = data_of(f"pipe:cat {tmp_path}/served/{{}}")
    for ours, theirs in zip(batches(remote), batches(data_of(str(tmp_path / "served"))), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_goes_from_a_folder_to_an_address_and_back(server: FolderServer, tmp_path: Path) -> None:
    unbroken = batches(data_of(str(tmp_path / "served")))
    first = data_of(server.url)
    for _, _ in zip(first.train_dataloader(), range(4), strict=False):
        pass
    state = {**first.state_dict(), "next_index": 8}
    for location in (str(tmp_path / "served"), server.url):
        second = data_of(location)
        second.load_state_dict(state)
        for batch, theirs in zip(second.train_dataloader(), unbroken[8:26:2], strict=False):
            assert torch.equal(batch["tokens"], theirs)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", ["cut", "flipped", "missing"])
def test_a_damaged_shard_is_named(server: FolderServer, tmp_path: Path, fault: str, workers: int) -> None:
    shard = next((tmp_path / "served").glob("train-*.tar"))
    if fault == "cut":
        server.cut.add(shard.name)
    elif fault == "flipped":
        content = bytearray(shard.read_bytes())
        content[700] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    data = data_of(server.url, num_workers=workers)
    with pytest.raises(ShardError, match=f"{server.url}/{shard.name}") as raised:
        next(iter(data.train_dataloader()))
    assert "\n" not in str(raised.value)
    assert not list(data.folder.glob("train-*"))


def test_a_copy_that_was_damaged_later_is_named_with_its_origin(server: FolderServer) -> None:
    data = data_of(server.url)
    next(iter(data.train_dataloader()))
    copy = next(data.folder.glob("train-*.tar"))
    content = bytearray(copy.read_bytes())
    content[700] ^= 1
    copy.write_bytes(content)
    with pytest.raises(
        ShardError, match=rf"{copy} \(copy of {server.url}/{copy.name}\) is damaged: member 0"
    ):
        next(iter(data_of(server.url).train_dataloader()))


def test_copies_serve_where_the_address_no_longer_answers(server: FolderServer, tmp_path: Path) -> None:
    expected = batches(data_of(server.url))
    (tmp_path / "served").rename(tmp_path / "gone")
    with pytest.warns(UserWarning, match=f"cannot read {server.url}/manifest.json: .*the copy in .* is used"):
        data = data_of(server.url)
    for ours, theirs in zip(batches(data), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_an_address_without_shards_is_named(server: FolderServer) -> None:
    with pytest.raises(ShardError, match=f"cannot read {server.url}/other/manifest.json: the server refused"):
        data_of(f"{server.url}/other")


def test_a_manifest_names_files_beside_it_only(server: FolderServer, tmp_path: Path) -> None:
    path = tmp_path / "served" / "manifest.json"
    name = Manifest.load(path.parent).splits["train"].shards[0].name
    for bad in ("../secret.tar", "x; touch y.tar", ".hidden"):
        path.write_text(path.read_text().replace(f'"{name}"', f'"{bad}"'))
        name = bad
        with pytest.raises(ShardError, match="lists a shard .*: wanted the name of a file beside it"):
            data_of(server.url)


def test_baselines_are_those_of_the_folder(server: FolderServer, tmp_path: Path) -> None:
    assert data_of(server.url).baselines() == data_of(str(tmp_path / "served")).baselines()


def test_the_former_class_reads_the_same_batches(server: FolderServer, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="keep_train_shards has no effect"):
        former = RemoteTextDataModule(
            server.url,
            BLOCK_TOKENS,
            2,
            num_workers=0,
            cache_dir=str(tmp_path / "mine"),
            keep_train_shards=False,
        )
    former.prepare_data()
    former.setup("fit")
    for ours, theirs in zip(batches(former), batches(data_of(str(tmp_path / "served"))), strict=True):
        assert torch.equal(ours, theirs)
    assert former.folder == copies_folder(server.url, str(tmp_path / "mine"))
    assert list(former.folder.glob("train-*.tar"))


def test_a_former_checkpoint_goes_on_at_the_beginning_of_the_order(server: FolderServer) -> None:
    former = RemoteTextDataModule(server.url, BLOCK_TOKENS, 2, num_workers=0)
    former.prepare_data()
    state = {**former.identity(), "resumes": 2}
    with pytest.warns(UserWarning, match="does not tell which samples its run has seen"):
        former.load_state_dict(state)
    assert former.state_dict()["next_index"] == 0
    with pytest.raises(ValueError, match="trained on other data"):
        former.load_state_dict({**state, "shards": "other"})
    former.load_state_dict({**former.identity(), "next_index": 6})
    assert former.state_dict()["next_index"] == 6
