"""Sentences from Parquet, Arrow and text files, read by the `datasets` library from a local folder or from the hub."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from moe_lm.data.corpus.lines import disk_errors_named
from moe_lm.errors import UserError

FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
"""The library's builder for each file suffix."""
_COLUMN = "text"
_BATCH = 1000
"""Rows read at a time."""


@dataclass(frozen=True)
class Rows:
    """Rows `first` to `last` - 1 (None: to the end) of the concatenation of some files of one format."""

    files: tuple[str, ...]
    size: int
    """Total bytes of the files."""
    streaming: bool
    """Whether rows are streamed instead of being copied into the library's cache first."""
    first: int = 0
    last: int | None = None

    @property
    def name(self) -> str:
        """Files and range of rows."""
        return f"{' '.join(self.files)}:{self.first}-{self.last} ({self.size} bytes)"

    def sentences(self) -> Iterator[str]:
        """Stream the column `text`; raises `UserError` where the files cannot be read."""
        return islice(self._rows(), self.first, self.last)

    def _rows(self) -> Iterator[str]:
        import datasets  # takes more than a second

        if not self.streaming:
            datasets.disable_progress_bars()
        kind = FORMATS[Path(self.files[0]).suffix]
        try:
            rows = datasets.load_dataset(kind, data_files=list(self.files), split="train", streaming=self.streaming)
            for table in rows.with_format("arrow").iter(batch_size=_BATCH):
                if _COLUMN not in table.column_names:
                    raise UserError(
                        f"{self.files[0]} has no column {_COLUMN!r}, only {', '.join(table.column_names)}; rename one"
                    )
                _check_is_text(_named(self.files), table.schema.field(_COLUMN).type)
                for sentence in table[_COLUMN].to_pylist():
                    yield sentence or ""
        except (UserError, MemoryError):
            raise
        except Exception as error:  # the library, Arrow and HTTP raise many classes
            raise UserError(f"{_named(self.files)} cannot be read: {_reason(error)}") from error


def _check_is_text(name: str, kind) -> None:
    """Raise `UserError` unless an Arrow type is text, dictionary-encoded text, or null."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_one(value) for is_one in texts):
        raise UserError(f"{name}: column {_COLUMN!r} holds {kind}, not text; write its sentences as strings")


def _named(files: tuple[str, ...]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} or one of the {len(files) - 1} files after it"


def _reason(error: Exception) -> str:
    """Return an exception's class and message as one line of limited length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def local_files(folder: Path, split: str) -> list[tuple[str, int]]:
    """Return path and bytes of each readable file in `folder`/`split`, sorted by name.

    Raises `UserError` where there is none, or where formats are mixed.
    """
    inside = folder / split
    with disk_errors_named(inside):
        paths = sorted(path for path in inside.iterdir() if path.suffix in FORMATS) if inside.is_dir() else []
        files = [(str(path.resolve()), path.stat().st_size) for path in paths]
    if not paths:
        raise UserError(f"{inside} holds no {', '.join(FORMATS)} file; give another corpus.path")
    if len(kinds := sorted({path.suffix for path in paths})) > 1:
        raise UserError(f"{inside} holds {' and '.join(kinds)} files; keep those of one format")
    return files


def hub_files(path: str, revision: str, folder: str) -> list[tuple[str, int]]:
    """Return address and bytes of each Parquet file in a folder of a dataset on the hub, sorted by name.

    The addresses name the commit that `revision` points to now. Raises `UserError` where the hub cannot be reached, or
    has no such dataset, revision or folder.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    local = "or give corpus.folder=..., the folder of the original archive"
    try:
        found = HfApi().dataset_info(path, revision=revision, files_metadata=True, timeout=30)
    except RevisionNotFoundError as error:
        raise UserError(
            f"the dataset {path} has no revision {revision}; give another corpus.revision, {local}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no dataset {path} open to you, nor is it a folder here; give another corpus.path, {local}"
        ) from error
    except Exception as error:  # HTTP, DNS and TLS raise many classes
        raise UserError(f"the hub cannot be asked for {path} ({_reason(error)}); try again later, {local}") from error
    files = sorted((file.rfilename, file.size or 0) for file in found.siblings or ())
    files = [file for file in files if Path(file[0]).parent == Path(folder) and file[0].endswith(".parquet")]
    if not files:
        raise UserError(f"{path} at {revision} holds no Parquet file in {folder}; give another corpus.subset, {local}")
    address = f"hf://datasets/{path}@{quote(found.sha, safe='')}"
    return [(f"{address}/{name}", size) for name, size in files]
