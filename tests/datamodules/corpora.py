"""Small corpora for tests, and what shards give back of them."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.prepare import planning
from datamodules.prepare.packing import PackSettings
from datamodules.shards import Manifest, TokenReader
from tests import ROOT

BYTES = {"kind": "bytes"}


def settings(**more: Any) -> PackSettings:
    return PackSettings(tokenizer=BYTES, **more)


def write_documents(path: Path, count: int, size: int = 200) -> list[str]:
    """A .jsonl of documents that tell their number; returns their texts."""
    texts = [f"document {number}: " + "abcdefghij " * (size // 11) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def read_tokens(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split."""
    reader = TokenReader(folder, Manifest.load(folder), split)
    tokens = np.empty(reader.tokens, dtype=reader.dtype)
    reader.read_into(tokens, 0)
    return tokens


def read_split(folder: Path, split: str) -> bytes:
    """The bytes of a split of byte shards."""
    return read_tokens(folder, split).tobytes()


def tar_of(members: dict[str, bytes]) -> bytes:
    """A tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def command(*arguments: object, unit_bytes: int = planning.UNIT_BYTES, **more: Any) -> subprocess.Popen[str]:
    """A process that runs the command line of the preparation, with units of another size."""
    code = (
        "import sys; from datamodules.prepare import __main__, planning\n"
        f"planning.UNIT_BYTES = {unit_bytes}; sys.exit(__main__.main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )
