"""scripts/environment with a stand-in for Python: it is set up once, whichever name that Python is called by."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Answers questions as Python does; making an environment and installing are noted.
STAND_IN = """#!/usr/bin/env bash
[ "$1" != -c ] || exec {python} "$@"
echo "$*" >>{done}
[ "$2" != venv ] || {{ mkdir -p .venv/bin && cp {stand_in} .venv/bin/python; }}
"""


def test_set_up_once(tmp_path):
    """Not again where the Python on the path is the environment's own, a link to the one that made it."""
    tree, done = tmp_path / "tree", tmp_path / "done"
    (tree / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/environment", tree / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tree)
    link = tmp_path / "link"
    link.symlink_to(os.path.realpath(sys.executable))
    stand_ins = []
    for name, python in (("one", os.path.realpath(sys.executable)), ("other", link)):
        stand_in = tmp_path / name
        stand_in.write_text(STAND_IN.format(python=python, done=done, stand_in=stand_in))
        stand_in.chmod(0o755)
        stand_ins.append(stand_in)
    for stand_in in (*stand_ins, stand_ins[0]):
        environment = {**os.environ, "PYTHON": str(stand_in)}
        subprocess.run([tree / "scripts/environment"], check=True, capture_output=True, env=environment)
        assert done.read_text().count("-m venv") == 1
    (tree / "pyproject.toml").write_text("")
    subprocess.run([tree / "scripts/environment"], check=True, capture_output=True, env=environment)
    assert done.read_text().count("-m venv") == 2
