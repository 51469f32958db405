"""What commit 5ce4160 stored is read as it read it: runs and an export are evaluated, and the runs trained on.

`data_5ce4160/expected.json` holds each run's overrides, the perplexities that 5ce4160 measured, and what it made of the
run with more words: perplexities, and hashes of weights and optimizer's state (`hashes` of scripts/compare_weights.py),
which hold on one kind of CPU only. A signal stopped `flat`, the others had finished. No prepared text is stored.
"""

import json
import shutil
from pathlib import Path

import pytest

STORED = Path(__file__).parent / "data_5ce4160"
EXPECTED = json.loads((STORED / "expected.json").read_text())
EVALUATED = {
    f"{kind}/{name}": each["evaluated"] for kind in ("runs", "exports") for name, each in EXPECTED[kind].items()
}
ON = ["machine.device=cpu", "machine.threads=1"]


@pytest.fixture(autouse=True)
def stored(tmp_path, monkeypatch) -> None:
    """The working directory is a copy of the stored folder."""
    shutil.copytree(STORED, tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")


@pytest.mark.parametrize("folder", EVALUATED)
def test_the_perplexity_is_what_it_was(moe_lm, folder):
    for split, perplexity in EVALUATED[folder]["perplexity"].items():
        outcome = moe_lm("evaluate", f"run={folder}", f"split={split}", "json=true", *ON)
        assert outcome.code == 0, outcome.err
        found = json.loads(outcome.out)
        assert found["step"] == EVALUATED[folder]["step"]
        assert found["perplexity"] == pytest.approx(perplexity, rel=1e-6)


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_more_words_continue_the_run_as_they_did(moe_lm, name):
    run, expected = EXPECTED["runs"][name], EXPECTED["runs"][name]["extended"]
    longer = f"training.num_words={expected['num_words']}"
    outcome = moe_lm("train", *run["overrides"].split(), longer)
    assert outcome.code == 0, outcome.err
    assert f"resumed at step {run['evaluated']['step']}," in outcome.err
    result = json.loads(Path("runs", name, "result.json").read_text())
    assert (result["steps"], result["words"]) == (expected["steps"], expected["words"])
    assert result["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
