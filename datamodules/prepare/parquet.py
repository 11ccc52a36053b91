"""Reads the text column of a parquet file a few rows at a time, in bounded memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.errors import DocumentError, optional_module

_BUFFER_BYTES = 1 << 20
# The rows that are read at a time hold about this much text.
_BATCH_BYTES = 1 << 24
_BATCH_ROWS = 256
# Writers end a page at a megabyte, but they look at its size only after so many rows, so a page of long rows is larger. A
# page is read whole, compressed and uncompressed, so twice its size must stay below what a preparation may take.
_PAGE_ROWS = 1024
_MAX_PAGE_BYTES = 150_000_000
# The hub's copy of WikiText strips the lines that hold nothing; in the raw files these are a space and a line feed.
_BLANK_LINE = b" \n"


def open_parquet(path: str) -> Any:
    """The `pyarrow.parquet.ParquetFile` of a path.

    Raises:
        DocumentError: if it is none, or pyarrow is missing.
    """
    library = optional_module("pyarrow.parquet", "data", str(path))
    try:
        # The column is read as it is needed, because a row group may have any size.
        return library.ParquetFile(
            path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        )
    except (ValueError, OSError) as error:
        raise DocumentError(f"cannot read {path}: {_one_line(error)}") from None


def parquet_texts(path: str, start: int, stop: int, column: str) -> Iterator[tuple[str, Any]]:
    """The values of a column in row groups `start` to `stop`, strings as undecoded bytes, under a name for messages.

    Raises:
        DocumentError: if there is no such column, rows are too long for the memory, or a page is damaged.
    """
    file = open_parquet(path)
    if column not in file.schema_arrow.names:
        raise DocumentError(f"{path}: no column {column!r}, only {', '.join(file.schema_arrow.names)}")
    groups = range(start, stop)
    rows = min((_rows_at_a_time(path, file.metadata.row_group(group), column) for group in groups), default=1)
    batches = file.iter_batches(rows, list(groups), columns=[column])
    # Counted from the beginning of the file, which other spans of it share.
    row = sum(file.metadata.row_group(group).num_rows for group in range(start))
    while True:
        try:
            batch = next(batches, None)
        # The rows after a damaged page cannot be found.
        except (ValueError, OSError) as error:
            raise DocumentError(f"cannot read {path} after row {row}: {_one_line(error)}") from None
        if batch is None:
            return
        for value in _undecoded(batch.column(0)).to_pylist():
            yield f"{path}, row {row}", value
            row += 1


def parquet_lines(paths: list[Path]) -> Iterator[bytes]:
    """WikiText as the Hugging Face hub stores it, one line per row, as the bytes of the raw file.

    Raises:
        DocumentError: if a row holds no text, and as `parquet_texts`.
    """
    for path in map(str, paths):
        for name, line in parquet_texts(path, 0, open_parquet(path).num_row_groups, "text"):
            if not isinstance(line, bytes):
                raise DocumentError(f"{name}: wanted a line of text, got {line!r}")
            yield line or _BLANK_LINE


def _rows_at_a_time(path: str, group: Any, column: str) -> int:
    """How many of a row group's rows hold about `_BATCH_BYTES`, going by their average.

    Raises:
        DocumentError: if pages may be too large for the memory.
    """
    chunks = map(group.column, range(group.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    row_bytes = max(1, size // max(1, group.num_rows))
    if min(size, _PAGE_ROWS * row_bytes) > _MAX_PAGE_BYTES:
        rows = max(1, _MAX_PAGE_BYTES // row_bytes)
        raise DocumentError(
            f"{path}: rows of {row_bytes / 1e6:.1f} MB on average, {group.num_rows} in a row group, take too much "
            f"memory: write the file anew with a row_group_size of {rows}, or as .jsonl"
        )
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))


def _undecoded(values: Any) -> Any:
    """Strings as bytes: decoding them is the check's, which tells the place where that fails."""
    arrow = optional_module("pyarrow", "data", "parquet")
    if arrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    wider = {arrow.string(): arrow.binary(), arrow.large_string(): arrow.large_binary()}
    return values.cast(wider[values.type]) if values.type in wider else values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
