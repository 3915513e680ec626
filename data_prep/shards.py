"""Parquet shards with image bytes and a label column, the layout in which Hugging Face exports ImageNet-1k."""

import json
from pathlib import Path
from typing import Any, ClassVar, Final

from data_prep.images import ImageError
from data_prep.sources import MAX_FILE_BYTES, Entries, Entry, Index, Progress, number_classes
from pipeline.config import UserError

IMAGE_COLUMNS: Final = ("image", "img", "jpg")
LABEL_COLUMNS: Final = ("label", "fine_label", "cls")
MAX_ROW_GROUP: Final = 2**32  # bytes when unpacked; a reader holds one


def _open(shard: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(shard)
    except OSError as error:
        raise UserError(f"{shard}: cannot be read: {error.strerror or error}") from None
    except pyarrow.ArrowException as error:
        raise UserError(f"{shard}: is no parquet file, damaged or cut short: {' '.join(str(error).split())}") from None


def _column(shard: Path, names: list[str], wanted: tuple[str, ...], what: str) -> str:
    found = [name for name in wanted if name in names]
    if not found:
        raise UserError(
            f"{shard}: has the columns {', '.join(names)}; the {what} should be called {' or '.join(wanted)}"
        )
    return found[0]


def _own_names(file: Any, label: str) -> list[str] | None:
    """The class names that Hugging Face's metadata hold for a label column."""
    try:
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


class Parquet:
    """Parquet shards; the order is that of the shards' names and of their rows, a row group being read as a whole.

    The image column (image, img or jpg) holds a file's bytes, or a struct with them under ``bytes``; the label column (label,
    fine_label or cls) holds integers. Class names are the metadata's where Hugging Face wrote them.
    """

    kind: ClassVar[str] = "parquet"
    counted_in: ClassVar[str] = "shard"
    any_order: ClassVar[bool] = False

    def __init__(self, root: Path, shards: list[Path] | None = None) -> None:
        """``shards`` lie in ``root``; they are needed for the index only."""
        self.root, self._shards = root.resolve(), sorted(shards or [])
        self._latest: tuple[tuple[str, int], list[Any]] = (("", 0), [])

    def index(self, classes: tuple[str, ...] | None = None, progress: Progress | None = None) -> Index:
        """As in ``Source``; strays are rows without a label."""
        entries, strays, own = Entries(), list[tuple[str, str]](), None
        for done, shard in enumerate(self._shards, 1):
            names = self._add(shard, entries, strays)
            if done > 1 and names != own:
                raise UserError(f"{shard}: names other classes than {self._shards[0].name}")
            own = names
            if progress is not None:
                progress(done, len(self._shards))
        if not entries:
            raise UserError(f"{self.root}: its {len(self._shards)} shards hold no row with a label")
        return Index(number_classes(max(entries.labels), own, classes, self.root), entries, strays)

    def _add(self, shard: Path, entries: Entries, strays: list[tuple[str, str]]) -> list[str] | None:
        """Append a shard's entries; returns the class names it knows."""
        import pyarrow

        with _open(shard) as file:
            _column(shard, file.schema_arrow.names, IMAGE_COLUMNS, "image column")
            label = _column(shard, file.schema_arrow.names, LABEL_COLUMNS, "label column")
            if not pyarrow.types.is_integer(file.schema_arrow.field(label).type):
                raise UserError(
                    f"{shard}: its column {label} is of type {file.schema_arrow.field(label).type}, not integers"
                )
            number = 0
            for group in range(file.num_row_groups):
                if file.metadata.row_group(group).total_byte_size > MAX_ROW_GROUP:
                    raise UserError(f"{shard}: row group {group} unpacks to more than {MAX_ROW_GROUP} bytes")
                try:
                    labels = file.read_row_group(group, [label], use_threads=False).column(0).to_pylist()
                except (OSError, pyarrow.ArrowException) as error:
                    raise UserError(f"{shard}: row group {group} is damaged: {' '.join(str(error).split())}") from None
                for row, value in enumerate(labels):
                    path = f"{shard.name}/{number + row:07}"
                    if value is None or not 0 <= value < 2**63:
                        strays.append((path, f"no label: it is {value}"))
                    else:
                        entries.append(Entry(path, value, group << 32 | row))
                number += len(labels)
            return _own_names(file, label)

    def read(self, path: str, position: int, size: int = -1) -> bytes:
        """As in ``Source``; the row group is kept for the next one."""
        shard, group, row = path.partition("/")[0], position >> 32, position & (2**32 - 1)
        latest, rows = self._latest
        if latest != (shard, group):
            rows = self._load(self.root / shard, group)
            self._latest = ((shard, group), rows)
        value = rows[row].as_py() if row < len(rows) else None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ImageError("cannot be read: its cell holds no bytes")
        if len(data) > MAX_FILE_BYTES:
            raise ImageError(f"too large: a file of {len(data)} bytes, at most {MAX_FILE_BYTES} are read")
        return data

    @staticmethod
    def _load(shard: Path, group: int) -> Any:
        import pyarrow

        try:
            with _open(shard) as file:
                column = _column(shard, file.schema_arrow.names, IMAGE_COLUMNS, "image column")
                return file.read_row_group(group, [column], use_threads=False).column(0)
        except UserError as error:
            raise ImageError(f"cannot be read: {error}") from None
        except (OSError, IndexError, pyarrow.ArrowException) as error:
            raise ImageError(f"damaged: row group {group}: {' '.join(str(error).split())}") from None
