"""Shared fixtures: small folders of shards made by the real preparation."""

from pathlib import Path

import pytest

from datamodules.prepare import planning, preparation, shard_writer
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.tokenizers import ByteTokenizer

# Three workers on two cores, and forked workers beside threads, are what some of these tests are about.
_EXPECTED = (
    "ignore:This DataLoader will create",
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning",
)

NUMBERED_BLOCKS = 26
BLOCK_TOKENS = 8


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for expected in _EXPECTED:
                item.add_marker(pytest.mark.filterwarnings(expected))


@pytest.fixture(scope="session")
def numbered_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose block of 8 tokens number i, in training and validation, reads `0000000i`."""
    folder = tmp_path_factory.mktemp("numbered")
    blocks = b"".join(b"%08d" % number for number in range(NUMBERED_BLOCKS))
    (folder / "corpus.txt").write_bytes(blocks + b"\n" + b"00000000" * 32)
    fraction = 257 / ((NUMBERED_BLOCKS + 32) * BLOCK_TOKENS + 1)
    settings = PackSettings(ByteTokenizer().describe(), val_fraction=fraction, test_fraction=0.0)
    prepare(plan_files([folder / "corpus.txt"], settings, "position"), folder / "shards")
    return folder / "shards"


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 5 kB and shards of two members of 1000 tokens, so that small corpora have many of each."""
    monkeypatch.setattr(planning, "UNIT_BYTES", 5000)
    monkeypatch.setattr(shard_writer, "MEMBER_TOKENS", 1000)
    monkeypatch.setattr(preparation, "MEMBER_TOKENS", 1000)
