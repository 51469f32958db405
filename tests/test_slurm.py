"""scripts/slurm without SLURM: `srun` and `scontrol` are stubs that behave like SLURM's and log their arguments.

Their behaviour is that of SLURM 22.05 with two nodes of two GPUs: tasks see the variables below, the exit code is the
highest of the tasks', and SLURM runs a copy of the script.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/slurm"

LOG = f"#!{sys.executable}\n" + textwrap.dedent("""
    import json, os, subprocess, sys

    def log(what, **more):
        with open(os.environ["LOG"], "a") as stream:
            stream.write(json.dumps({"what": what, "args": sys.argv[1:]} | more) + "\\n")
""")

SRUN = LOG + textwrap.dedent("""
    log("srun", env={key: value for key, value in os.environ.items() if key.startswith("SLURM_")})
    command = sys.argv[1:]
    options = {}
    while command[0].startswith("--"):
        key, _, value = command.pop(0).partition("=")
        options[key] = value
    nodes, number, per_node = (int(options[key]) for key in ("--nodes", "--ntasks", "--ntasks-per-node"))
    assert number == nodes * per_node
    step = {"SLURM_STEP_NUM_TASKS": str(number), "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_NTASKS": str(number)}
    tasks = [
        subprocess.Popen(command, env=os.environ | step | {
            "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node), "SLURM_NODEID": str(rank // per_node),
        })
        for rank in range(number)
    ]
    sys.exit(max(task.wait() for task in tasks))
""")

SCONTROL = LOG + textwrap.dedent("""
    log("scontrol")
    if sys.argv[1] == "show":
        print("one\\ntwo")
    sys.exit(int(os.environ.get("REQUEUE", 0)) if sys.argv[1] == "requeue" else 0)
""")

PYTHON = LOG + textwrap.dedent("""
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    log("python", env={key: os.environ[key] for key in keys}, pid=os.getpid(), parent=os.getppid())
    sys.exit(json.loads(os.environ["CODES"])[int(os.environ["RANK"])])
""")


class Job:
    """An allocation of nodes with GPUs, whose batch script SLURM runs from a copy in a folder of its own."""

    def __init__(self, folder: Path):
        self.repository, self.log = folder / "the repository", folder / "log.jsonl"
        for path, text in {
            folder / "bin/srun": SRUN,
            folder / "bin/scontrol": SCONTROL,
            self.repository / ".venv/bin/python": PYTHON,
        }.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.copy = folder / "slurm_script"
        shutil.copy(SCRIPT, self.copy)
        self.path = f"{folder / 'bin'}:{os.environ['PATH']}"

    def run(self, *arguments: str, nodes=1, gpus=2, codes=None, **variables: str):
        """Run the script with tasks that end with these codes."""
        given = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MASTER"))}
        allocation = {
            "PATH": self.path,
            "LOG": str(self.log),
            "CODES": json.dumps(codes or [0] * nodes * gpus),
            "SLURM_JOB_ID": "4210007",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_GPUS_ON_NODE": str(gpus),
        }
        return subprocess.run(
            ["bash", self.copy, *arguments],
            env=given | allocation | variables,
            cwd=self.repository,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, what: str) -> list[dict]:
        """Return the logged calls of a program."""
        if not self.log.exists():
            return []
        return [call for call in map(json.loads, self.log.read_text().splitlines()) if call["what"] == what]

    @property
    def requeued(self) -> bool:
        """Return whether the job was requeued."""
        return ["requeue", "4210007"] in [call["args"] for call in self.calls("scontrol")]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_one_task_for_each_gpu_with_the_variables_of_torchrun(job):
    assert job.run("model=moe_4", nodes=2, gpus=2).returncode == 0
    tasks = sorted(job.calls("python"), key=lambda call: call["env"]["RANK"])
    assert [task["env"] for task in tasks] == [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "one",
            "MASTER_PORT": "20007",
        }
        for rank in range(4)
    ]
    [srun] = job.calls("srun")
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--wait=0"} <= set(srun["args"])
    assert not job.requeued


def test_arguments_reach_the_training_unchanged(job):
    """Including spaces, commas, quotes, brackets and what a shell would expand."""
    arguments = ["model=moe_4", "corpus.train=[a b.txt,c*.txt]", 'name=it\'s "x"', "data=$HOME `date` \\", "file="]
    assert job.run(*arguments, gpus=1).returncode == 0
    [task] = job.calls("python")
    assert task["args"] == ["-m", "moe_lm", "train", *arguments]


def test_python_is_the_task_itself(job):
    """SLURM's cgroups signal only the processes that it started, not their children: a shell would swallow signals."""
    job.run("model=moe_4", gpus=2)
    tasks = job.calls("python")
    assert len({task["parent"] for task in tasks}) == 1
    assert len({task["pid"] for task in tasks}) == 2


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [([0, 0], 0, False), ([75, 75], 0, True), ([0, 75], 0, True), ([3, 3], 3, False), ([75, 137], 137, False)],
    ids=str,
)
def test_a_stopped_and_saved_training_is_requeued(job, codes, code, requeued):
    """Only after code 75; any other code becomes the job's."""
    assert job.run("model=moe_4", codes=codes).returncode == code
    assert job.requeued == requeued


def test_a_failing_requeue(job):
    """If requeueing fails, the job ends with the training's code."""
    assert job.run("model=moe_4", codes=[75, 75], REQUEUE="1").returncode == 75


def test_options_that_would_hide_gpus_or_contradict_are_unset(job):
    """sbatch --gpus-per-task=1 would bind each task to one GPU, number 0 whatever its LOCAL_RANK."""
    bound = {"SLURM_GPUS_PER_TASK": "1", "SLURM_NTASKS_PER_GPU": "1", "SLURM_GPU_BIND": "single:1"}
    assert job.run("model=moe_4", **bound).returncode == 0
    [srun] = job.calls("srun")
    assert not bound.keys() & srun["env"].keys()


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ([], {}, "usage: sbatch "),
        (["model=moe_4"], {"SLURM_JOB_ID": ""}, "usage: sbatch "),
        (["model=moe_4"], {"SLURM_GPUS_ON_NODE": ""}, "the allocation has no GPU"),
        (["model=moe_4"], {"SLURM_GPUS": "3"}, "3 GPUs on 1 nodes are not 2 on each"),
    ],
    ids=["no arguments", "no SLURM", "no GPU", "uneven"],
)
def test_an_unusable_allocation_gives_one_line(job, arguments, variables, words):
    done = job.run(*arguments, **variables)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not job.calls("srun")


def test_a_missing_environment_is_named(job):
    shutil.rmtree(job.repository / ".venv")
    done = job.run("model=moe_4")
    assert done.returncode == 2
    assert "call sbatch in the repository, after scripts/environment" in done.stderr


def test_sbatch_reads_what_the_script_needs():
    """sbatch stops reading at the first command."""
    head = SCRIPT.read_text().split("\nset -euo")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    options = {line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")}
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= options
