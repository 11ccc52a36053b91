"""A checkpoint is complete under its name or absent: damaged files, full disks, and copies in the background."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from causalrn import fit
from causalrn.training.checkpoint import newest_checkpoint, read_checkpoint
from causalrn.training.checkpoint_io import BackgroundCheckpointIO, snapshot, write_file
from tests.faults import write_config
from tests.test_fit import error_of
from tests.training.test_crashes import same_weights


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", strategy="auto", devices=1)


def fit_in(run_dir: Path, config: Path, *arguments: str) -> None:
    fit.main(["--config", str(config), "--run_dir", str(run_dir), *arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    fit_in(folder / "run", write_config(folder / "config.yaml", strategy="auto", devices=1))
    return folder / "run"


@pytest.mark.slow
def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, config: Path, whole: Path
) -> None:
    fit_in(tmp_path / "run", config)
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    os.truncate(newest, newest.stat().st_size - 100)
    with pytest.warns(UserWarning, match=f"checkpoint {newest} is passed over: .* truncated"):
        fit.main(["--resume", str(tmp_path / "run")])
    same_weights(whole, tmp_path / "run")


def test_a_folder_that_lost_a_file_is_passed_over(tmp_path: Path) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    for folder in (old, new):
        folder.mkdir()
        (folder / "sizes.json").write_text('{"rank-0": 4}')
        # As beside the shards of FSDP.
        torch.save({"global_step": 2 if folder == new else 1, "loops": {}}, folder / "meta.pt")
    (old / "rank-0").write_bytes(b"1234")
    (new / "rank-0").write_bytes(b"123")
    with pytest.warns(UserWarning, match="rank-0 is missing or cut short"):
        assert newest_checkpoint(tmp_path) == old


@contextlib.contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A file system of its own, or skips where none can be mounted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        # Lazily: checkpoints that were read are still mapped.
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, config: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (whole / "checkpoints" / "last.ckpt").stat().st_size
    with small_disk(tmp_path / "run" / "checkpoints", 3 * size // 2048) as folder:
        capsys.readouterr()
        arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
        with pytest.warns(UserWarning, match="was not written .*bytes are free.*training goes on"):
            line = error_of(fit.main, arguments, capsys)
        assert "step=12.ckpt was not written" in line
        kept = newest_checkpoint(folder)
        assert kept is not None
        assert read_checkpoint(kept)["global_step"] == 4
        assert [path.name for path in folder.iterdir() if not path.is_symlink()] == [kept.name]
        assert (folder / "last.ckpt").resolve() == kept
        subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
        fit.main(["--resume", str(tmp_path / "run")])
        same_weights(whole, tmp_path / "run")


def test_a_file_size_limit_is_a_full_disk_too(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="a.ckpt was not written .*bytes are free"):
            write_file({"weights": torch.ones(100_000)}, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_of_its_moment_and_keeps_tensors_one(tmp_path: Path) -> None:
    weight = torch.ones(3)
    copy = snapshot({"a": weight, "b": [weight.view(3)], "c": weight[:2], "step": 3})
    weight.zero_()
    assert copy["a"].tolist() == [1, 1, 1]
    assert copy["a"] is copy["b"][0]
    assert copy["c"].tolist() == [1, 1]
    io = BackgroundCheckpointIO()
    big = {"network": {}, "state_dict": {"weight": torch.zeros(1_000_000)}}
    io.save_checkpoint(big, tmp_path / "a.ckpt")
    big["state_dict"]["weight"].fill_(1)
    io.save_checkpoint(big, tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    io.teardown()
    assert read_checkpoint(tmp_path / "last.ckpt")["state_dict"]["weight"].sum() == 1_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.ckpt", "last.ckpt"]
    write_file({**big, "state_dict": {}}, tmp_path / "c.ckpt")
    assert (tmp_path / "last.ckpt").resolve().name == "c.ckpt"
