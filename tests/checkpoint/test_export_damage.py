"""An export with a missing, altered or additional file, or with a pickle, does not open."""

import io
import json
import os
import pickle
import shutil
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import sign
from tiny_run import change
from tiny_training import assert_one_line, call, working_in

from moe_lm import load
from moe_lm.errors import UserError

FILES = [
    "export.json",
    "README.md",
    "config.yaml",
    "model-00001-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "vocabulary/vocabulary.txt",
]


@pytest.fixture(scope="module")
def exported_once(trained_once, tmp_path_factory) -> Path:
    """A folder with the exports `one` (a file of tensors) and `several`."""
    folder = tmp_path_factory.mktemp("exported")
    with working_in(trained_once):
        assert call("export", "run=runs/tiny", f"to={folder / 'one'}") == 0
        assert call("export", "run=runs/tiny", f"to={folder / 'several'}", "max_file_bytes=4500") == 0
    return folder


@pytest.fixture
def there(exported_once, trained_once, tmp_path, monkeypatch) -> Path:
    """The working directory holds copies of both exports, and the text."""
    for name in ("one", "several"):
        shutil.copytree(exported_once / name, tmp_path / name)
    for name in ("text", "data"):
        (tmp_path / name).symlink_to(trained_once / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(folder: str, *expected: str) -> None:
    """Opening the folder is refused in one line that holds the expected words; nothing in it has run."""
    line = "opened"
    try:
        load(folder)
    except UserError as error:
        line = str(error)
    assert len(line.splitlines()) == 1
    for words in expected:
        assert words in line, (expected, line)
    assert not Path("canary").exists(), expected


@contextmanager
def replaced(path: Path, data: bytes | None):
    """Replace a file for a while, or take it away."""
    before = path.read_bytes()
    path.unlink() if data is None else path.write_bytes(data)
    yield
    path.write_bytes(before)


class Canary:
    def __reduce__(self):
        return os.system, ("touch canary",)


def pickles() -> dict[str, bytes]:
    """A pickle in every protocol, and the archive that torch writes; each would leave a file behind."""
    archive = io.BytesIO()
    torch.save({"embedding_VD": Canary()}, archive)
    return {f"protocol {i}": pickle.dumps(Canary(), i) for i in range(6)} | {"torch": archive.getvalue()}


def test_both_are_intact(there, moe_lm):
    assert sorted(p.relative_to("several").as_posix() for p in Path("several").rglob("*") if p.is_file()) == sorted(
        [*FILES, "model-00002-of-00003.safetensors"]
    )
    for folder in ("one", "several"):
        sign(folder)
        assert moe_lm("evaluate", f"run={folder}").code == 0


def test_a_missing_file(there):
    for name in FILES:
        with replaced(Path("several", name), None):
            refused("several", f"several/{name} is missing")
    for name in ("model.safetensors", "config.yaml", "vocabulary/vocabulary.txt"):
        with replaced(Path("one", name), None):
            refused("one", f"one/{name} is missing")


def test_an_altered_file(there):
    for name in FILES[1:]:
        data = Path("several", name).read_bytes()
        first, last = bytes([data[0] ^ 1]) + data[1:], data[:-1] + bytes([data[-1] ^ 1])
        for altered in (first, last, data + b"\n", data[:-1]):
            with replaced(Path("several", name), altered):
                refused("several", f"several/{name} was altered")


@pytest.mark.parametrize(
    "name",
    ["extra.txt", ".hidden", "vocabulary/extra", "model-00004-of-00004.safetensors", "pytorch_model.bin", "a/b/c"],
)
def test_an_additional_file(there, name):
    path = Path("one", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Canary()))
    refused("one", "is no part of the export")


@pytest.mark.parametrize("command", ["evaluate", "score file=text/test.txt", "inspect", "audit", "export to=x"])
def test_every_command_reports_it_in_one_line(there, moe_lm, command):
    Path("several/README.md").write_bytes(b"altered")
    expected = "is an export already" if "export" in command else "several/README.md was altered"
    assert_one_line(moe_lm(*command.split(), "run=several"), expected)


def test_a_file_of_tensors_that_the_index_does_not_name(there):
    for folder in ("one", "several"):
        name = "model-00009-of-00009.safetensors"
        shutil.copy("one/model.safetensors", Path(folder, name))
        sign(folder, name)
        refused(folder, "model-00009-of-00009.safetensors")


def test_an_additional_folder(there):
    Path("one/inspect").mkdir()
    refused("one", "one/inspect is no part of the export")


def test_a_forged_export_with_a_pickle_for_a_file(there):
    """Those of protocol 2 and later are known by their first bytes, before anything reads a file that holds text."""
    known = {kind: data for kind, data in pickles().items() if kind not in ("protocol 0", "protocol 1")}
    for name, data in [*product(FILES[1:2], known.values()), *product(FILES[2:], [known["torch"]])]:
        with replaced(Path("several", name), data):
            sign("several")
            expected = "which could run any program: refused" if name.endswith((".md", ".yaml", ".txt")) else ""
            refused("several", f"several/{name}", expected)


def test_a_pickle_of_any_protocol_for_a_file_that_is_read(there):
    for name in ("model.safetensors", "config.yaml", "vocabulary/vocabulary.txt"):
        for data in pickles().values():
            with replaced(Path("one", name), data):
                sign("one")
                refused("one", "one")


@pytest.mark.parametrize("name", ["extra.pkl", "pytorch_model.bin", "vocabulary/../extra", "../extra", "/tmp/extra"])
def test_a_forged_export_may_not_name_other_files(there, name):
    if ".." not in name and name[0] != "/":
        Path("one", name).write_bytes(b"x")
    path = Path("one/export.json")
    record = json.loads(path.read_text())
    record["files"][name] = record["files"]["README.md"]
    path.write_text(json.dumps(record))
    refused("one", "no part of an export: refused")


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (("model", "layers", "middle", "_target_"), "os.system", "refused"),
        (("model", "layers", "middle", "_target_"), "moe_lm.inference.checkpoint.load_model", "refused"),
        (("model", "layers", "middle", "gate", "_target_"), "moe_lm.gate.noisy_top_k.NoisyTopK ", "refused"),
        (("vocabulary", "_target_"), "builtins.exec", "refused"),
        (("extra",), {"_target_": "os.system"}, "refused"),
        (("name",), "${oc.env:HOME}", "refused"),
        (("model", "layers", "middle", "_args_"), ["touch canary"], "refused"),
        (("vocabulary", "_target_"), "moe_lm.model.lstm.Lstm", "is no vocabulary"),
        (("model", "width"), 9, "does not fit the model"),
        (("model", "order"), ["lower"], "does not fit the model"),
    ],
    ids=str,
)
def test_a_forged_configuration(there, place, value, expected):
    change(*place, value=value, file=Path("one/config.yaml"))
    sign("one")
    refused("one", expected)


RECORDS = [
    "",
    "{",
    "[]",
    "{}",
    '{"format": 2}',
    '{"format": 1}',
    '{"format": 1, "name": "tiny", "step": 12, "data": "x", "files": []}',
    '{"format": 1, "name": "tiny", "step": "12", "data": "x", "files": {}}',
    '{"format": 1, "name": "tiny", "step": 12, "data": "x", "files": {"README.md": 3}}',
    '{"format": 1, "name": "tiny", "step": 12, "data": "x", "files": {"README.md": {"bytes": "1", "blake2b": ""}}}',
    20_000 * "[",
]


def test_a_damaged_record(there):
    for data in (*(text.encode() for text in RECORDS), b"\xff\xfe"):
        with replaced(Path("one/export.json"), data):
            refused("one", "one/export.json")


def change_tensors(tensors: dict, what: str) -> None:
    name = "layers.middle.gate.gate_DE"
    if what == "missing":
        del tensors[name]
    elif what == "additional":
        tensors["more"] = torch.zeros(3)
    elif what == "shape":
        tensors[name] = tensors[name].t().contiguous()
    else:
        tensors[name] = tensors[name].double()


@pytest.mark.parametrize("what", ["missing", "additional", "shape", "type"])
def test_forged_tensors(there, what):
    tensors = load_file("one/model.safetensors")
    change_tensors(tensors, what)
    save_file(tensors, "one/model.safetensors")
    sign("one")
    refused("one", "does not fit the model", "more" if what == "additional" else "gate_DE")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_forged_numbers(there, value):
    tensors = load_file("one/model.safetensors")
    tensors["softmax.bias_V"][3] = value
    save_file(tensors, "one/model.safetensors")
    sign("one")
    refused("one", "one is damaged", "softmax.bias_V holds numbers that are not finite")


def test_a_forged_vocabulary(there, moe_lm):
    """Two words are swapped, so that the token ids of the training data mean other words."""
    file = Path("one/vocabulary/vocabulary.txt")
    first, second, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([first, rest[0], second, *rest[1:]]))
    sign("one")
    assert_one_line(moe_lm("evaluate", "run=one"), "one has another vocabulary than the data")


def test_a_forged_configuration_does_not_choose_the_data_folder(there, moe_lm):
    change("data", value="elsewhere", file=Path("one/config.yaml"))
    sign("one")
    assert moe_lm("evaluate", "run=one").code == 0
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("weight_map"),
        lambda index: index.update(weight_map=[]),
        lambda index: index["weight_map"].update(softmax="model-00001-of-00003.safetensors"),
        lambda index: index["weight_map"].update({"softmax.bias_V": "model-00001-of-00003.safetensors"}),
        lambda index: index["weight_map"].update({"softmax.bias_V": "../several/model-00003-of-00003.safetensors"}),
        lambda index: index["weight_map"].update({"softmax.bias_V": "config.yaml"}),
    ],
)
def test_a_forged_index(there, change):
    file = Path("several/model.safetensors.index.json")
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    sign("several")
    refused("several", "model.safetensors.index.json is damaged")


def test_links_to_the_very_files_are_read(there, moe_lm):
    """The cache of a model hub links files; the target of a link is checked like a file."""
    expected = moe_lm("evaluate", "run=one", "json=true").out
    shutil.copytree("one", "blobs")
    for name in ("README.md", "model.safetensors", "config.yaml", "vocabulary/vocabulary.txt"):
        Path("one", name).unlink()
        Path("one", name).symlink_to(Path("blobs", name).resolve())
    assert moe_lm("evaluate", "run=one", "json=true").out == expected
    Path("blobs/README.md").write_text("altered")
    refused("one", "one/README.md was altered")
