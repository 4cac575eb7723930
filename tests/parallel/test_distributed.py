"""Finding a process's place in its job, and joining the job with real processes."""

import contextlib
import ctypes
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import unittest.mock
from pathlib import Path

import jax
import pytest

from launch.plan_cpu import measure_cpu
from moe.config import ConfigError, MeshConfig
from moe.exit_codes import BAD_INPUT, PEER_STUCK
from moe.parallel import distributed, watch
from moe.parallel.cluster import Cluster, expand_hosts, find_cluster, is_restarted, why_alone
from moe.parallel.devices import (
    check_cpu_devices,
    check_devices,
    check_gpus,
    check_platforms,
    explain_variable,
    visible_gpus,
)
from moe.parallel.distributed import barrier, from_first, on_tpu
from moe.parallel.rendezvous import Arrival, NotJoined, listed, meet
from tests.jobs import free_port

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[07-10]",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NUM_NODES": "4",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
JOBSET = {
    "JOBSET_NAME": "run",
    "REPLICATED_JOB_NAME": "workers",
    "JOB_INDEX": "1",
    "JOB_COMPLETION_INDEX": "2",
    "PODS_PER_JOB": "4",
    "REPLICATED_JOB_REPLICAS": "2",
}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "8",
    "JAX_PROCESS_ID": "5",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (JAX, Cluster("explicit settings", "host:1234", 8, 5)),
        # (31 * 17 + 0) % 4096 + 61440
        (SLURM, Cluster("SLURM", "node07:61967", 8, 3)),
        (SLURM | {"SLURM_STEP_ID": "1"}, Cluster("SLURM", "node07:61968", 8, 3)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (JOBSET, Cluster("Kubernetes JobSet", "run-workers-0-0.run:8476", 8, 6)),
        (JOBSET | {"PODS_PER_JOB": "1", "REPLICATED_JOB_REPLICAS": "1"}, None),
        # A batch script, the shell of salloc, and one that is a step itself.
        ({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        (SLURM | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, None),
        (SLURM | {"SLURM_STEP_ID": str(0xFFFFFFFB)}, None),
        # mpirun starts its helpers by srun, whose variables its processes inherit.
        (SLURM | MPI | JAX, Cluster("Open MPI and explicit settings", "host:1234", 8, 5)),
    ],
)
def test_the_place_follows_from_the_environment(environment, expected):
    assert find_cluster(environment) == expected


def test_open_mpi_takes_the_address_of_mpirun_or_of_this_host():
    cluster = find_cluster(MPI)
    host, port = cluster.coordinator.split(":")
    assert (host, cluster.num_processes, cluster.process_id) == ("10.96.0.1", 4, 1)
    assert 61440 <= int(port) < 2**16
    local = find_cluster(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert local.coordinator == f"127.0.0.1:{port}"
    uri = {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620:10d::3]:43370"}
    assert find_cluster(MPI | uri).coordinator.startswith("[fe80::b9b]:")


def test_flags_complete_and_override_the_variables():
    assert find_cluster(JAX, process_id=2).process_id == 2
    assert find_cluster({}, "a:1", 2, 0) == Cluster("explicit settings", "a:1", 2, 0)
    assert find_cluster(SLURM, "other:99") == Cluster(
        "SLURM and explicit settings", "other:99", 8, 3
    )
    assert find_cluster({}, num_processes=1) is None
    # A scheduler started this process alone, and the flags know of more.
    one = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert find_cluster(one, "a:1", 4, 2) == Cluster("SLURM and explicit settings", "a:1", 4, 2)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (JAX | {"JAX_PROCESS_ID": "8"}, r"process_id=8 is out of range: .*between 0 and 7"),
        (JAX | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1' is no whole number"),
        (JAX | {"JAX_NUM_PROCESSES": "0"}, "num_processes=0"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": ""}, "--coordinator_address is missing"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "host"}, "'host' is no HOST:PORT"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "host:99999"}, "'host:99999' is no HOST:PORT"),
        ({"JAX_NUM_PROCESSES": "8"}, "--process_id is missing, and no scheduler"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "--num_processes is missing, and no scheduler"),
        (MPI | {"OMPI_MCA_orte_hnp_uri": ""}, "Open MPI does not say where process 0 runs"),
        (MPI | {"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE is not set"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set: start .* by srun"),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, "has 4 nodes, and SLURM_STEP_NUM_NODES=2"),
        (SLURM | {"SLURM_PROCID": "8"}, "process_id=8 is out of range"),
        (JOBSET | {"JOB_COMPLETION_INDEX": ""}, "set completionMode: Indexed"),
        (SLURM | {"JAX_NUM_PROCESSES": "4"}, "num_processes=4, but SLURM started 8 processes"),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, "num_processes=1, but SLURM started 8 processes"),
    ],
)
def test_a_contradiction_is_refused_in_one_line(environment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        find_cluster(environment)
    assert "\n" not in str(caught.value)


def test_a_command_without_srun_is_told_that_it_runs_alone():
    batch = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16"}
    assert why_alone(batch).startswith("SLURM job 17 has 16 tasks on 2 hosts, but srun did not")
    assert why_alone({"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "1"}) is None
    assert why_alone(SLURM) is why_alone({}) is None


def test_a_restart_is_told_from_a_first_start() -> None:
    names = ("SLURM_RESTART_COUNT", "JOBSET_RESTART_ATTEMPT", "MOE_RESTART_COUNT")
    for name in names:
        assert [is_restarted({name: text}) for text in ("", "0", "1", "12")] == [0, 0, 1, 1]
    assert not is_restarted({})
    with pytest.raises(ConfigError, match="SLURM_RESTART_COUNT='x' is no whole number"):
        is_restarted({"SLURM_RESTART_COUNT": "x"})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("a,b-2.org,c", ["a", "b-2.org", "c"]),
        ("a[08-10,12],b", ["a08", "a09", "a10", "a12", "b"]),
        ("a[001,3-4]x,b[9-11]", ["a001x", "a3x", "a4x", "b9", "b10", "b11"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a[0099-0101]", ["a0099", "a0100", "a0101"]),
        ("127.0.0.[11-12]", ["127.0.0.11", "127.0.0.12"]),
    ],
)
def test_node_lists_are_expanded(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "a[1-", "a[]", "a[3-1]", "a,,b", "a[1-2", "a b", "a[x]"])
def test_other_text_is_no_node_list(text):
    with pytest.raises(ConfigError, match="is no SLURM node list"):
        expand_hosts(text)


def visit(clusters, gpus=(), timeout_s=20.0):
    """Lets some processes of a job meet, each in a thread, and returns what each is told."""
    told = {}

    def run(index, cluster):
        try:
            told[index] = meet(cluster, gpus, timeout_s)
        except NotJoined as error:
            told[index] = str(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(clusters)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # the first of the list comes first
    for thread in threads:
        thread.join(timeout=60)
    return [told[index] for index in range(len(clusters))]


def clusters(num_processes, *process_ids):
    address = f"127.0.0.1:{free_port()}"
    return [Cluster("a test", address, num_processes, number) for number in process_ids]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_processes_learn_of_all_others(order):
    told = visit(clusters(3, *order), gpus=["GPU-1"])
    assert told[0] == told[1] == told[2]
    assert [(a.process_id, a.num_processes, a.gpus) for a in told[0]] == [
        (number, 3, ("GPU-1",)) for number in range(3)
    ]


def test_late_processes_are_named_to_those_that_came():
    told = visit(clusters(5, 0, 2, 4), timeout_s=2.0)
    assert told[0] == told[1] == told[2]
    assert told[0].startswith(
        f"processes 1, 3 of 5 did not reach process 0 on {socket.gethostname()} within 2 s"
    )


def test_a_missing_process_0_is_named():
    [told] = visit(clusters(2, 1), timeout_s=0.3)
    assert told.startswith("process 0 of 2 was not at 127.0.0.1:")
    assert "(Connection refused)" in told


def test_two_processes_with_one_number_are_refused():
    told = visit(clusters(3, 0, 1, 1))
    assert "has come twice" in told[0] and told[0] == told[1] == told[2]


def test_a_process_of_another_job_is_refused():
    first, second = clusters(3, 0, 1)
    told = visit([first, second._replace(num_processes=4)])
    assert told[0] == told[1]
    assert told[0].startswith("process 1 of 4") and "does not belong to the job" in told[0]


def test_other_programs_are_ignored_and_a_restarted_process_may_come_again():
    first, second, third = clusters(3, 0, 1, 2)
    host, port = first.coordinator.split(":")
    told = []
    thread = threading.Thread(target=lambda: told.append(meet(first, (), 20.0)))
    thread.start()
    for text in (b"GET / HTTP/1.1\n", b"[1, 2]\n", b'[1, 3, "gone", []]\n', b"{" * 70_000):
        while thread.is_alive():
            with contextlib.suppress(OSError):  # it does not listen yet, or has hung up
                with socket.create_connection((host, int(port)), timeout=5) as connection:
                    connection.sendall(text)
                break
            time.sleep(0.05)
    visitors = visit([second, third])
    thread.join(timeout=60)
    assert [arrival.host for arrival in told[0]] == [socket.gethostname()] * 3
    assert told[0] == visitors[0] == visitors[1]


def test_a_port_that_another_program_holds_is_named(monkeypatch):
    monkeypatch.setattr("moe.parallel.rendezvous._BIND_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(NotJoined, match=rf"cannot listen at port {port} of .* in use"):
            meet(Cluster("a test", f"127.0.0.1:{port}", 2, 0), (), 5.0)


def arrivals(*gpus):
    return [
        Arrival(number, len(gpus), f"node-{number // 2}", tuple(own))
        for number, own in enumerate(gpus)
    ]


def test_processes_that_hold_the_same_gpu_are_named():
    check_gpus(arrivals("ab", "cd", "ef"))
    check_gpus(arrivals("", "", ""))
    with pytest.raises(NotJoined, match="process 2 of 4 on node-1 and process 3 of 4 on node-1"):
        check_gpus(arrivals("ab", "cd", "ef", "gf"))


def raising(error):
    return unittest.mock.Mock(side_effect=error)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AssertionError(), "asks for a GPU, and no NVIDIA GPU is visible"),
        (
            RuntimeError("Unable to initialize: 'cuda' is not in the list of known backends: []"),
            "names a platform that this installation of JAX has no plugin for: install it",
        ),
    ],
)
def test_a_platform_that_is_not_here_is_told_in_one_line(monkeypatch, error, told):
    monkeypatch.setattr(jax, "local_devices", raising(error))
    with pytest.raises(ConfigError, match=f"^JAX_PLATFORMS=cuda {told}"):
        check_platforms({"JAX_PLATFORMS": "cuda"})


def test_jobs_and_plans_for_a_cpu_say_so_too(monkeypatch):
    """A single process does before it runs its command (`launch.command_line`)."""
    monkeypatch.setattr(jax, "local_devices", raising(AssertionError()))
    for module, name in (
        (distributed, "meet"),
        (distributed, "check_gpus"),
        (distributed, "_start_jax"),
        (distributed, "_delay_abort"),
        (distributed, "_client"),
        (watch, "start"),
    ):
        monkeypatch.setattr(module, name, unittest.mock.MagicMock())
    with pytest.raises(ConfigError, match="no NVIDIA GPU is visible"):
        distributed.join(clusters(2, 0)[0])
    with pytest.raises(ConfigError, match="no NVIDIA GPU is visible"):
        measure_cpu()


@pytest.mark.parametrize("count", ["x", "0", "-2", "", "1.5"])
def test_a_number_of_cpu_devices_that_jax_cannot_make_is_told_in_one_line(count):
    with pytest.raises(ConfigError, match=r"^JAX_NUM_CPU_DEVICES=.* is no .*: set it to 1 or more"):
        check_cpu_devices({"JAX_NUM_CPU_DEVICES": count})


def test_a_variable_that_jax_cannot_read_is_told_in_one_line():
    """JAX's own functions raise the errors, so that this fails where their words change."""
    jax_config = importlib.import_module("jax._src.config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_TEST", "x")
        with pytest.raises(ValueError, match="JAX flag") as number:
            jax_config.int_state("jax_num_test", 1, "")
        patch.setenv("JAX_BOOL_TEST", "maybe")
        with pytest.raises(ValueError, match="truth value") as truth:
            jax_config.bool_state("jax_bool_test", True, "")
    assert explain_variable(number.value).startswith("JAX_NUM_TEST: ")
    assert explain_variable(truth.value).startswith("JAX_BOOL_TEST: ")
    assert "set it to" in explain_variable(truth.value)
    with pytest.raises(ValueError, match=r"^another$"):
        explain_variable(ValueError("another"))


def test_a_device_that_is_in_use_is_no_mistake_of_the_user(monkeypatch):
    error = RuntimeError("The TPU is already in use by process with pid 1")
    monkeypatch.setattr(jax, "local_devices", raising(error))
    with pytest.raises(RuntimeError, match="already in use"):
        check_platforms({})


def test_a_process_that_sees_another_number_of_devices_is_named():
    with pytest.raises(NotJoined, match=r"process 3 of 4 on node-1 sees 1 GPU, and most .* see"):
        check_gpus(arrivals("ab", "cd", "ef", "g"))
    with pytest.raises(NotJoined, match=r"sees 1 GPU \(and process 3 too\)"):
        check_gpus(arrivals("ab", "cd", "e", "g"))
    with pytest.raises(NotJoined, match="process 1 of 3 on node-0 sees 4 devices"):
        check_devices(arrivals("", "", ""), [8, 4, 8], None)


def test_devices_that_are_not_those_of_the_mesh_are_refused():
    check_devices(arrivals("", ""), [8, 8], MeshConfig(data=2, fsdp=8))
    check_devices(arrivals("", ""), [8, 8], MeshConfig(data=-1, fsdp=3))  # make_mesh refuses it
    with pytest.raises(NotJoined, match=r"each of the 2 processes sees 1 device, .* wants 16"):
        check_devices(arrivals("", ""), [1, 1], MeshConfig(data=2, fsdp=8))


class Driver:
    """Stands for NVIDIA's driver, with three GPUs."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = 3
        return 0

    def cuDeviceGet(self, device, number):
        device._obj.value = number
        return 0 if number < 3 else 101  # CUDA_ERROR_INVALID_DEVICE

    def cuDeviceGetUuid_v2(self, identifier, device):
        identifier[0] = 10 + device.value
        return 0


def test_gpus_are_told_by_their_identifiers(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    rest = "00" * 15
    assert visible_gpus({}) == [f"0a{rest}", f"0b{rest}", f"0c{rest}"]
    assert visible_gpus({"JAX_PLATFORMS": "cuda,cpu", "JAX_LOCAL_DEVICE_IDS": "2"}) == [f"0c{rest}"]
    assert visible_gpus({"JAX_PLATFORMS": "cpu"}) == []
    with pytest.raises(ConfigError, match="names GPU 3, and there are 3"):
        visible_gpus({"JAX_LOCAL_DEVICE_IDS": "3"})


def test_a_machine_without_the_driver_has_no_gpus(monkeypatch):
    def refuse(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert visible_gpus({}) == []


@pytest.mark.parametrize(
    ("platforms", "libtpu", "expected"),
    [("", True, True), ("tpu,cpu", True, True), ("cpu", True, False), ("", False, False)],
)
def test_tpus_are_looked_for_without_jax(platforms, libtpu, expected, tmp_path, monkeypatch):
    device = tmp_path / "0000:00:05.0"
    device.mkdir()
    (device / "vendor").write_text("0x1ae0\n")
    monkeypatch.setattr("moe.parallel.distributed._PCI", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: libtpu or None)
    assert on_tpu({"JAX_PLATFORMS": platforms}) == expected
    (device / "vendor").write_text("0x8086\n")
    assert not on_tpu({"JAX_PLATFORMS": platforms})


def test_long_lists_of_processes_are_cut():
    assert listed([3]) == "process 3"
    assert listed(list(range(12))) == "processes 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"


def test_one_process_has_nobody_to_wait_for():
    barrier("here", 0.0)
    assert from_first("name", lambda: "text") == "text"


def run_processes(program, directory, num_processes=2, devices=1, waited_for=None):
    """Runs a program in joined processes, and returns the codes, outputs and errors of some.

    The others are killed. By default it waits for all.
    """
    variables = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(num_processes),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=directory,
            env=os.environ | variables | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(num_processes)
    ]
    chosen = processes if waited_for is None else [processes[waited_for]]
    try:
        written = [process.communicate(timeout=250) for process in chosen]
    finally:
        for process in processes:
            with process:  # which closes its pipes
                process.kill()
    codes = [process.returncode for process in chosen]
    return codes, [out for out, _ in written], [error for _, error in written]


@pytest.mark.slow
def test_joined_processes_agree_and_a_late_one_is_named(tmp_path):
    program = """
import json, os, pathlib, time
from moe.config import ConfigError
from moe.parallel import distributed
def refuse():
    raise ConfigError("x=1 is wrong")
cluster = distributed.find_cluster(os.environ)
distributed.join(cluster)
import jax
texts = [distributed.from_first("number", lambda: text) for text in (str(os.getpid()), "again")]
try:
    distributed.from_first("checked", refuse)
except ConfigError as error:
    texts.append(str(error))
distributed.barrier("here", 60)
while cluster.process_id == 1 and not pathlib.Path("gave up").exists():
    time.sleep(0.01)
try:
    distributed.barrier("late", 0.5)
except distributed.Late as error:
    texts.append(str(error))
    pathlib.Path("gave up").touch()
distributed.barrier("here", 60)
print(json.dumps([jax.process_count(), jax.device_count(), *texts]))
"""
    codes, outputs, errors = run_processes(program, tmp_path, devices=2)
    assert codes == [0, 0], errors
    first, second = (json.loads(output) for output in outputs)
    assert first == second
    late = f"process 1 of 2 on {socket.gethostname()} did not come to late within 0.5 s"
    assert first[:2] == [2, 4] and first[3:] == ["again", "x=1 is wrong", late]
    assert f"process 1 of 2 on {socket.gethostname()}, 2 devices, coordinator 127" in errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["shared", "own"])
def test_a_compilation_cache_that_is_not_shared_is_not_used(folder, tmp_path):
    program = f"""
import os
from moe.parallel import distributed
cluster = distributed.find_cluster(os.environ)
name = "shared" if "{folder}" == "shared" else str(cluster.process_id)
os.environ["JAX_COMPILATION_CACHE_DIR"] = "{tmp_path}/" + name
distributed.join(cluster)
import jax
print(jax.config.jax_enable_compilation_cache, distributed.gather("x", name * 2, 60))
"""
    codes, outputs, errors = run_processes(program, tmp_path)
    assert codes == [0, 0], errors
    line = f"process 1 of 2 on {socket.gethostname()} does not see the compilation cache"
    if folder == "shared":
        assert outputs == ["True ['sharedshared', 'sharedshared']\n"] * 2
        assert line not in errors[0] and not list(tmp_path.glob("*/.seen*"))
    else:
        assert outputs == ["False ['00', '11']\n"] * 2
        assert line in errors[0] and line not in errors[1]


# Process PROCESS_ID runs FAILURE, and all others end well.
COMMAND = """
from launch import command_line
from moe.config import ConfigError
from moe.parallel import distributed
def main(values):
    import jax
    if jax.process_index() == PROCESS_ID:
        FAILURE
    print("done", jax.process_index())
command_line.run(main, "A command.", devices=True)
"""


@pytest.mark.slow
def test_only_process_0_of_a_command_prints(tmp_path):
    program = COMMAND.replace("PROCESS_ID", "0").replace("FAILURE", "pass")
    codes, outputs, errors = run_processes(program, tmp_path)
    assert (codes, outputs) == ([0, 0], ["done 0\n", ""]), errors


@pytest.mark.slow
@pytest.mark.parametrize("process_id", [0, 1])
@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        ("raise ConfigError('x=1 is wrong')", BAD_INPUT, "error: x=1 is wrong"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("distributed.barrier('never', 0.3)", PEER_STUCK, "stuck: process"),
    ],
)
def test_a_failing_process_leaves_at_once(failure, code, line, process_id, tmp_path):
    """JAX alone would wait in it for the others, and they wait for it."""
    program = COMMAND.replace("PROCESS_ID", str(process_id)).replace("FAILURE", failure)
    codes, _, _ = run_processes(program, tmp_path, waited_for=process_id)
    [log] = tmp_path.glob(f"logs/*/process-0000{process_id}.log")
    assert codes == [code] and line in log.read_text()
