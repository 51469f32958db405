"""scripts/slurm without SLURM: `srun` and `scontrol` are programs that do as SLURM does and tell what was asked.

How they behave was looked at in SLURM 22.05 with two nodes of two GPUs: tasks see the variables below, the exit code
is the highest of the tasks', and SLURM runs a copy of the script.
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

TELL = f"#!{sys.executable}\n" + textwrap.dedent("""
    import json, os, subprocess, sys

    def tell(what, **told):
        with open(os.environ["TOLD"], "a") as stream:
            stream.write(json.dumps({"what": what, "args": sys.argv[1:]} | told) + "\\n")
""")

SRUN = TELL + textwrap.dedent("""
    tell("srun", env={key: value for key, value in os.environ.items() if key.startswith("SLURM_")})
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

SCONTROL = TELL + textwrap.dedent("""
    tell("scontrol")
    if sys.argv[1] == "show":
        print("one\\ntwo")
    sys.exit(int(os.environ.get("REQUEUE", 0)) if sys.argv[1] == "requeue" else 0)
""")

PYTHON = TELL + textwrap.dedent("""
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    tell("python", env={key: os.environ[key] for key in keys}, pid=os.getpid(), parent=os.getppid())
    sys.exit(json.loads(os.environ["CODES"])[int(os.environ["RANK"])])
""")


class Job:
    """An allocation of nodes with GPUs, whose batch script SLURM runs from a copy in a folder of its own."""

    def __init__(self, folder: Path):
        self.repository, self.told = folder / "the repository", folder / "told.jsonl"
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
            "TOLD": str(self.told),
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
        """Return what a program was called with, each time."""
        if not self.told.exists():
            return []
        return [call for call in map(json.loads, self.told.read_text().splitlines()) if call["what"] == what]

    @property
    def requeued(self) -> bool:
        """Whether the job went back into the queue."""
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


def test_arguments_come_to_training_as_they_are(job):
    """Spaces, commas, quotes, brackets and what a shell would replace."""
    arguments = ["model=moe_4", "corpus.train=[a b.txt,c*.txt]", 'name=it\'s "x"', "data=$HOME `date` \\", "file="]
    assert job.run(*arguments, gpus=1).returncode == 0
    [task] = job.calls("python")
    assert task["args"] == ["-m", "moe_lm", "train", *arguments]


def test_python_is_the_task_itself(job):
    """SLURM's cgroups signal the processes that it started and not their children: no shell may stand between."""
    job.run("model=moe_4", gpus=2)
    tasks = job.calls("python")
    assert len({task["parent"] for task in tasks}) == 1
    assert len({task["pid"] for task in tasks}) == 2


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [([0, 0], 0, False), ([75, 75], 0, True), ([0, 75], 0, True), ([3, 3], 3, False), ([75, 137], 137, False)],
    ids=str,
)
def test_what_stopped_and_saved_is_queued_again(job, codes, code, requeued):
    """75 alone; any other code is the job's own."""
    assert job.run("model=moe_4", codes=codes).returncode == code
    assert job.requeued == requeued


def test_queue_that_takes_nothing_back(job):
    """Where requeueing fails the job ends with training's code."""
    assert job.run("model=moe_4", codes=[75, 75], REQUEUE="1").returncode == 75


def test_options_that_would_hide_gpus_or_contradict_are_taken_away(job):
    """sbatch --gpus-per-task=1 would bind each task to one GPU, which then is number 0 whatever LOCAL_RANK says."""
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
def test_what_cannot_be_run_is_one_line(job, arguments, variables, words):
    done = job.run(*arguments, **variables)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not job.calls("srun")


def test_environment_that_is_missing_is_named(job):
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
