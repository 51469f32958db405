"""Exports: a trained model as one folder of safetensors, each file with its checksum; no pickle.

export.json  model.safetensors  config.yaml  vocabulary/  README.md (the model card)

A large model is split as Hugging Face does: model-00001-of-00002.safetensors ... model.safetensors.index.json
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_lm.atomic_io import checksum, sync
from moe_lm.compat import current_parameter
from moe_lm.errors import UserError, in_a_line
from moe_lm.parallel.group import Shard

FORMAT = 1
RECORD, WEIGHTS, INDEX = "export.json", "model.safetensors", "model.safetensors.index.json"
_SPLIT_WEIGHTS = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_NAMES = re.compile(
    rf"{re.escape(WEIGHTS)}|{re.escape(INDEX)}|{_SPLIT_WEIGHTS.pattern}|config\.yaml|README\.md|vocabulary/\w[\w.]*"
)
_PICKLE = re.compile(rb"\x80[\x00-\x05]|PK\x03\x04")
"""First bytes of a pickle of protocol 2 or later, and of the zip archive of pickles that torch.save writes."""
_AGAIN = "export or copy the model again"


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, even one that lost its export.json."""
    return any((folder / name).exists() for name in (RECORD, WEIGHTS, INDEX))


def output_path(folder: Path, name: str) -> Path:
    """Return where a command writes its output: inside a run's folder, but beside an export, which stays unchanged."""
    if not is_export(folder):
        return folder / name
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    return folder.with_name(f"{folder.name}-{name}")


def verify(folder: Path) -> dict:
    """Return the content of export.json after checking every file.

    Raises `UserError` for a missing, altered or additional file, and for pickled data under any name.
    """
    record = _read_record(folder)
    listed, present = record["files"], _file_names(folder)
    if missing := sorted(listed.keys() - present):
        raise UserError(f"{folder / missing[0]} is missing: {_AGAIN}")
    if additional := sorted(present - listed.keys()):
        raise UserError(f"{folder / additional[0]} is no part of the export: remove it")
    for name, entry in listed.items():
        path = folder / name
        try:
            with path.open("rb") as stream:
                # A safetensors file begins with a length, which may look like a pickle. A pickle with this suffix would
                # fail to load.
                if _PICKLE.match(stream.read(4)) and path.suffix != ".safetensors":
                    raise UserError(f"{path} holds pickled data, which could run any program: refused")
            if path.stat().st_size != entry["bytes"] or checksum(path) != entry["blake2b"]:
                raise UserError(f"{path} was altered since it was exported: {_AGAIN}")
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return record


def write(folder: Path, record: dict, save: Callable[[Path], None]) -> None:
    """Let `save` fill a temporary folder, add export.json and rename it: the export appears whole or not at all.

    Raises `UserError` if the export cannot be written or another process is writing it.
    """
    partial = folder.parent / f".{folder.name}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=0):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                save(partial)
                _finish(partial, record)
                partial.rename(folder)
                sync(folder.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Timeout:
        raise UserError(f"{folder} is being written by another process: wait for it") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}; mend this or choose another to=...") from error


def save_weights(folder: Path, model: nn.Module, max_file_bytes: int) -> None:
    """Write the model's tensors into an existing folder; a file exceeds the limit only if a single tensor does."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    parts = _split({name: tensor.nbytes for name, tensor in tensors.items()}, max_file_bytes)
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        files = [WEIGHTS]
    for file, names in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if len(parts) > 1:
        weight_map = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def load_weights(folder: Path, model: nn.Module, shards: Mapping[str, Shard]) -> None:
    """Load the model's tensors in place; of sharded parameters, only the local rows.

    Raises `UserError` unless files and model agree in every name, shape and type.
    """
    targets, found = model.state_dict(), {}
    for file in _weight_files(folder):
        try:
            with safe_open(folder / file, framework="pt") as stored:
                for stored_name in stored.keys():  # noqa: SIM118
                    name = current_parameter(stored_name)
                    where = f"{folder / file}: {stored_name}"
                    _load_tensor(targets.get(name), shards.get(name), stored.get_slice(stored_name), where)
                    found[name] = file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / file} is no safetensors file, or a damaged one ({_reason(error)})") from error
    if lacking := targets.keys() - found.keys():
        raise UserError(f"{folder} does not fit the model: {min(lacking)} is in none of its files")
    if (folder / INDEX).exists() and _weight_map(folder) != found:
        raise UserError(f"{folder / INDEX} is damaged: it does not name the files that hold the tensors")


def model_card(record: Mapping, config: Mapping) -> str:
    """Return README.md as Markdown, from the content of export.json and the run's configuration."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not needed to open an export

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"thousands": "{:,}".format, "repr": repr, "any": any}
    layers = [config["model"]["layers"][name] for name in config["model"]["order"]]
    gates = [[_kind(layer[key]) for key in ("primary_gate", "gate") if key in layer] for layer in layers]
    corpus = {k: v for k, v in config["corpus"].items() if not k.startswith("_") and v not in (None, [])}
    return environment.get_template("model_card.md.j2").render(
        {"preset": None, "perplexity": None, "run": shlex.quote(f"run={record['name']}"), **record},
        config=config,
        layers=[{"kind": _kind(layer), "gates": of_layer} for layer, of_layer in zip(layers, gates, strict=True)],
        corpus={
            "kind": _kind(config["corpus"]),
            "settings": [f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in corpus.items()],
        },
    )


def _kind(config: Mapping) -> str:
    """Return the module of a part's class, which is the name of its YAML file."""
    return config["_target_"].split(".")[-2]


def _load_tensor(target: Tensor | None, shard: Shard | None, stored, name: str) -> None:
    """Copy a stored tensor, or the rows of this process's shard, into its target."""
    shape = tuple(stored.get_shape())
    wanted = None if target is None else tuple(target.shape) if shard is None else (shard.total, *target.shape[1:])
    if wanted != shape:
        raise UserError(f"{name} does not fit the model: its shape is {shape}, wanted {wanted}")
    rows = stored[...] if shard is None else stored[shard.first : shard.first + shard.size]
    if rows.dtype != target.dtype:
        raise UserError(f"{name} does not fit the model: it is {rows.dtype}, wanted {target.dtype}")
    target.copy_(rows)


def _weight_files(folder: Path) -> list[str]:
    files = [WEIGHTS]
    if (folder / INDEX).exists():
        files = sorted(set(_weight_map(folder).values()))
        if wrong := [file for file in files if not _SPLIT_WEIGHTS.fullmatch(file)]:
            raise UserError(f"{folder / INDEX} is damaged: it names {wrong[0]!r}")
    if unread := {path.name for path in folder.glob("*.safetensors")} - set(files):
        raise UserError(f"{folder / min(unread)} is not in the index of the model's files: remove it")
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of each tensor, under this version's names."""
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {current_parameter(str(name)): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({_reason(error)})") from error


def _split(sizes: Mapping[str, int], max_file_bytes: int) -> list[list[str]]:
    """Distribute the names, in order, over files of at most `max_file_bytes`."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > max_file_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def _finish(partial: Path, record: dict) -> None:
    """Write export.json, give its permissions to all files, and flush them to the disk."""
    files = {name: partial / name for name in sorted(_file_names(partial))}
    listed = {name: {"bytes": path.stat().st_size, "blake2b": checksum(path)} for name, path in files.items()}
    text = json.dumps({"format": FORMAT, **record, "files": listed}, indent=1, ensure_ascii=False)
    (partial / RECORD).write_text(text + "\n", encoding="utf-8")
    for path in [*partial.rglob("*"), partial]:
        if path.is_file():
            shutil.copymode(partial / RECORD, path)  # safetensors creates files that only their owner may read
        sync(path)


def _read_record(folder: Path) -> dict:
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(
                f"{path} has format {record['format']!r}; this version reads {FORMAT}: use another version of moe-lm"
            )
        sound = type(record["step"]) is int and all(isinstance(record[key], str) for key in ("name", "data"))
        for entry in record["files"].values():
            sound &= isinstance(entry["bytes"], int) and isinstance(entry["blake2b"], str)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {_AGAIN}") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): {_AGAIN}") from error
    if not sound:
        raise UserError(f"{path} is damaged: {_AGAIN}")
    if foreign := [name for name in record["files"] if not _NAMES.fullmatch(name)]:
        raise UserError(f"{path} names {foreign[0]!r}, which is no part of an export: refused")
    return record


def _file_names(folder: Path) -> set[str]:
    """Return all paths inside the folder but export.json and the folder of the vocabulary itself."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name
        for name, path in paths.items()
        if name != RECORD and not (name == "vocabulary" and path.is_dir() and not path.is_symlink())
    }


def _reason(error: BaseException) -> str:
    return in_a_line(error, 200) or type(error).__name__
