"""Remote shards over a real HTTP server: what arrives is checked, split over ranks and workers, and cached."""

import functools
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules.remote import RemoteBlocks, RemoteTextDataModule
from datamodules.remote_files import download, join_url
from datamodules.shards import Manifest, ShardError
from datamodules.stream import Rank

BLOCK_TOKENS = 8
BLOCKS = 26


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, numbered_shards: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a private copy of the numbered shards."""
    folder = tmp_path / "served"
    shutil.copytree(numbered_shards, folder)
    handler = functools.partial(_QuietHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def remote(url: str, cache: Path, **more: object) -> RemoteTextDataModule:
    data = RemoteTextDataModule(url, BLOCK_TOKENS, batch_size=2, cache_dir=str(cache), **more)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def ids(tokens: object) -> list[int]:
    return [int(bytes(row.tolist())) for row in tokens]  # type: ignore[attr-defined]


@pytest.mark.parametrize("keep", [True, False])
def test_an_epochs_worth_of_remote_blocks_holds_every_block(
    tmp_path: Path, served: tuple[str, Path], keep: bool
) -> None:
    data = remote(served[0], tmp_path / "cache", num_workers=0, keep_train_shards=keep)
    # The shuffle buffer is larger than this corpus, so several rounds pass before the first block is sure to come.
    seen: set[int] = set()
    loader = data.train_dataloader()
    assert len(loader) == BLOCKS // 2
    for _ in range(40):
        for batch in loader:
            assert batch["tokens"].shape == batch["targets"].shape == (2, BLOCK_TOKENS)
            assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
            seen.update(ids(batch["tokens"]))
    assert seen == set(range(BLOCKS))
    assert any(Path(data.shards_dir).glob("train-*.tar")) == keep


def test_validation_is_read_from_checked_local_copies(tmp_path: Path, served: tuple[str, Path]) -> None:
    data = remote(served[0], tmp_path / "cache")
    (loader,) = data.val_dataloader()
    assert sum(len(batch["tokens"]) for batch in loader) == 32


def test_the_pipe_scheme_reads_the_same_files(tmp_path: Path, served: tuple[str, Path]) -> None:
    data = remote(f"pipe:cat {served[1]}/{{}}", tmp_path / "cache", num_workers=0, keep_train_shards=False)
    batch = next(iter(data.train_dataloader()))
    assert all(0 <= number < BLOCKS for number in ids(batch["tokens"]))


def test_ranks_take_turns_along_one_order_of_shards(served: tuple[str, Path]) -> None:
    manifest = Manifest.load(served[1])
    source = [{"shard": number} for number in range(10)]
    taken = [
        list(RemoteBlocks("", manifest, BLOCK_TOKENS, Rank(rank, 2), "key", None)._split_by_rank(source))
        for rank in range(2)
    ]
    assert [item["shard"] for item in taken[0]] == [0, 2, 4, 6, 8]
    assert [item["shard"] for item in taken[1]] == [1, 3, 5, 7, 9]


def test_a_resumed_run_continues_in_another_order(tmp_path: Path, served: tuple[str, Path]) -> None:
    first = remote(served[0], tmp_path / "cache", num_workers=0)
    beginning = ids(next(iter(first.train_dataloader()))["tokens"])
    resumed = remote(served[0], tmp_path / "cache", num_workers=0)
    resumed.load_state_dict(first.state_dict())
    assert ids(next(iter(resumed.train_dataloader()))["tokens"]) != beginning


@pytest.mark.parametrize(
    ("workers", "keep"), [(0, True), (0, False), pytest.param(1, True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing"])
def test_a_damaged_remote_shard_is_named(
    tmp_path: Path, served: tuple[str, Path], fault: str, keep: bool, workers: int
) -> None:
    shard = next(served[1].glob("train-*.tar"))
    content = bytearray(shard.read_bytes())
    if fault == "truncated":
        shard.write_bytes(content[:700])
    elif fault == "flipped":
        content[700] ^= 1
        shard.write_bytes(content)
    else:
        shard.unlink()
    data = remote(served[0], tmp_path / "cache", num_workers=workers, keep_train_shards=keep)
    with pytest.raises(ShardError, match=shard.name) as raised:
        next(iter(data.train_dataloader()))
    assert "\n" not in str(raised.value)


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    url = join_url("http://127.0.0.1:9", "manifest.json")
    with pytest.raises(ShardError, match="cannot open http://127.0.0.1:9/manifest.json"):
        download(url, tmp_path / "manifest.json")
    assert not list(tmp_path.iterdir())


def test_a_copy_of_another_size_is_fetched_again_and_a_damaged_one_is_named(
    tmp_path: Path, served: tuple[str, Path]
) -> None:
    folder = Path(remote(served[0], tmp_path / "cache", num_workers=0).shards_dir)
    for split in ("val", "train"):
        (folder / next(served[1].glob(f"{split}-*.tar")).name).write_bytes(b"of an older corpus")
    data = remote(served[0], tmp_path / "cache", num_workers=0)
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()[0]))
    copy = next(folder.glob("train-*.tar"))
    content = bytearray(copy.read_bytes())
    content[700] ^= 1
    copy.write_bytes(content)
    with pytest.raises(
        ShardError, match=rf"{copy} \(copy of {served[0]}/{copy.name}\) is damaged at member 0"
    ):
        next(iter(data.train_dataloader()))


def test_baselines_wait_for_the_training_shards(tmp_path: Path, served: tuple[str, Path]) -> None:
    data = remote(served[0], tmp_path / "cache", num_workers=0)
    assert data.baselines() == {}
    next(iter(data.train_dataloader()))
    assert set(data.baselines()) == {"unigram_entropy", "5-gram", "xz"}


def test_a_server_that_falls_silent_is_named(
    tmp_path: Path, served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = remote(served[0], tmp_path / "cache", num_workers=0, keep_train_shards=False)
    shard = next(served[1].glob("train-*.tar")).name
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 10000\r\n\r\nbeginning")
            ended.wait(30)
            connection.close()

        ended = threading.Event()
        thread = threading.Thread(target=answer)
        thread.start()
        data.shards_url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr("datamodules.remote_files._TIMEOUT_SECONDS", 0.2)
        try:
            with pytest.raises(ShardError, match=f"{shard}: timed out"):
                next(iter(data.train_dataloader()))
        finally:
            ended.set()
            thread.join()
