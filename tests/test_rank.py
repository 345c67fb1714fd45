"""What a process takes itself for, from what launchers and old shells leave in its environment."""

import os
import subprocess
import sys

import pytest

from megarl.processes import python_command, python_path
from megarl.rank import check_rendezvous, first_host, srun_variables
from megarl.types import UserError

TASK = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_a_task_of_srun_gets_what_torchrun_would_give_it_without_scontrol():
    assert srun_variables(TASK) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "30001",
    }
    on_node_2 = {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2"}
    assert srun_variables(TASK | on_node_2)["LOCAL_WORLD_SIZE"] == "1"
    assert srun_variables(TASK | on_node_2 | {"SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "2"
    assert srun_variables(TASK | {"SLURM_TASKS_PER_NODE": "4"})["LOCAL_WORLD_SIZE"] == "4"
    given = srun_variables(TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.1", "4242")
    assert srun_variables(TASK | {"SLURM_JOB_ID": "", "SLURM_LOCALID": ""})["MASTER_PORT"] == "20000"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        srun_variables({name: value for name, value in TASK.items() if name != "SLURM_STEP_NODELIST"})


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": ""},  # salloc on a login node, a batch script
        {"SLURM_STEP_ID": "4294967290"},  # salloc's shell as an interactive step
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1 in an allocation of 4
        {"SLURM_NTASKS": "1"},
        {"SLURM_PROCID": ""},
    ],
)
def test_a_shell_in_an_allocation_is_not_a_task(change):
    assert srun_variables(TASK | change) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node3", "node3"),
        ("a,b", "a"),
        ("node[01-04,07]", "node01"),
        ("node[5,7]-ib,x", "node5-ib"),
        ("rack[1-2]n[003-009]", "rack1n003"),
        ("", ""),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 is set but MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "general", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=general"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 and WORLD_SIZE=2"),
        (srun_variables(TASK | {"SLURM_NTASKS": "2(x2)"}), "RANK=3 and WORLD_SIZE=2\\(x2\\)"),
        (srun_variables(TASK | {"MASTER_PORT": "http"}), "MASTER_PORT=http is not a port"),
    ],
)
def test_half_of_what_torchrun_sets_is_refused_with_what_is_missing(environment, words):
    with pytest.raises(UserError, match=words) as caught:
        check_rendezvous(environment)
    assert "\n" not in str(caught.value)


SHELL = {"RANK": "1", "WORLD_SIZE": "8"}


def run(*arguments, folder, **environment):
    command = python_command("megarl.cli", *arguments)
    inherited = os.environ | python_path() | environment
    return subprocess.run(command, cwd=folder, env=inherited, capture_output=True, text=True, timeout=300)


@pytest.mark.processes
def test_commands_that_run_alone_ignore_an_old_rank_and_speak(tmp_path):
    done = run("recipes", "nonsense", folder=tmp_path, **SHELL)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nonsense" in done.stderr


@pytest.mark.processes
def test_an_old_rank_without_an_address_is_one_line_whatever_its_number(tmp_path):
    done = run("train", "quickstart", folder=tmp_path, **SHELL)
    assert done.returncode == 2
    assert done.stderr.startswith("megarl: error: RANK=1 is set but MASTER_ADDR") and done.stderr.count("\n") == 1


@pytest.mark.processes
@pytest.mark.parametrize("left", [{"WORLD_SIZE": "8"}, {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "3"}])
def test_what_an_old_launcher_left_without_a_rank_is_forgotten(tmp_path, left):
    done = run("train", "quickstart", "run.stepz=3", folder=tmp_path, **left)
    assert done.returncode == 2
    assert done.stderr.startswith("megarl: error: run.stepz is not a known key") and done.stderr.count("\n") == 1


@pytest.mark.processes
def test_torchruns_ranks_say_once_what_every_one_of_them_refuses(tmp_path):
    """Whichever is first ends the others."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [*torchrun, "--nproc-per-node=3", "-m", "megarl.cli", "train", "quickstart", f"run.dir={tmp_path}/run"]
    done = subprocess.run(
        [*command, "learner.world_size=null"],
        cwd=tmp_path,
        env=os.environ | python_path(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("megarl: error: ")]
    assert done.returncode and len(said) == 1, done.stderr
    assert "learner.world_size=3 is not a multiple of tensor_model_parallel_size" in said[0]
