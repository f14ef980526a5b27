"""The files in launch/: what they start is what torchrun, poa, Slurm and Kubernetes understand."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from torch.distributed.run import get_args_parser

from poa.cli.pretrain import parse

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ("torchrun.sh", "slurm.sbatch")
RUN = ("--data", "digits", "--recipe", "digits", "--out", "run")


def started(arguments):
    """What torchrun's arguments start: torchrun's options, poa's configuration and the run directory."""
    options = get_args_parser().parse_args(arguments)
    command, *rest = options.training_script_args
    assert options.module
    assert (options.training_script, command) == ("poa", "pretrain")
    return options, *parse(rest)


def size(quantity):
    """A Kubernetes quantity of memory or disk in GiB."""
    return int(re.fullmatch(r"(\d+)Gi", quantity)[1])


class Stubs:
    """Commands that note their arguments, one call a line, and do what their script says."""

    def __init__(self, folder):
        self.folder = folder

    def add(self, name, script):
        path = self.folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\t" "{name}" "$@" >> calls; echo >> calls\n{script}\n')
        path.chmod(0o755)

    def calls(self, name):
        lines = (line.split("\t")[:-1] for line in (self.folder / "calls").read_text().splitlines())
        return [words[1:] for words in lines if words[0] == name]

    def start(self, script, **environment):
        environment = os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}"} | environment
        return subprocess.Popen(["bash", LAUNCH / script, *RUN], cwd=self.folder, env=environment)


@pytest.fixture
def stubs(tmp_path):
    return Stubs(tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_bash(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name], check=False).returncode == 0


@pytest.mark.parametrize("name", [*SCRIPTS, "../docs/howto/scale.md"])
def test_shown_calls_are_ones_that_poa_understands(name):
    text = (LAUNCH / name).read_text().replace("\\\n", " ")
    calls = re.findall(r"(?:launch/(?:torchrun\.sh|slurm\.sbatch)|-m poa pretrain) (--.*)", text)
    assert calls
    for call in calls:
        config, out = parse(call.split())
        assert config.data.source
        assert out.name


class TestTorchrun:
    def test_each_host_starts_its_part_of_the_run(self, stubs):
        stubs.add("torchrun", "")
        assert stubs.start("torchrun.sh", RDZV_ENDPOINT="host1:29400", NNODES="2", NPROC_PER_NODE="4").wait() == 0
        options, config, out = started(stubs.calls("torchrun")[0])
        assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "4", 3)
        assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "host1:29400")
        assert (config.data.source, str(out)) == ("digits", "run")

    @pytest.mark.parametrize("missing", ["RDZV_ENDPOINT", "NNODES"])
    def test_what_has_no_default_is_asked_for(self, stubs, missing):
        stubs.add("torchrun", "")
        values = {"RDZV_ENDPOINT": "host1:29400", "NNODES": "2", missing: ""}
        assert stubs.start("torchrun.sh", **values).wait() != 0
        assert not (stubs.folder / "calls").exists()


JOB = {
    "SLURM_JOB_ID": "70123",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_PER_TASK": "32",
}


class TestSlurm:
    @pytest.fixture
    def job(self, stubs):
        """Starts the job's script. Its step ends when the file `end` says with what status, or when it is told to."""
        stubs.add("srun", 'touch begun; until [ -e end ]; do sleep 0.02; done; exit "$(cat end)"')
        stubs.add("scancel", "echo ${ON_SIGNAL:-1} > end")
        stubs.add(
            "scontrol", 'if [ "$2" = hostnames ]; then printf "n1\\nn2\\n"; else echo "JobId=1 $PREEMPTION x=y"; fi'
        )

        def start(**environment):
            process = stubs.start("slurm.sbatch", **JOB, **environment)
            while not (stubs.folder / "begun").exists():
                assert process.poll() is None
                time.sleep(0.02)
            return process

        return SimpleNamespace(start=start, end=stubs.folder / "end", calls=stubs.calls)

    @staticmethod
    def requeued(job):
        return ["requeue", JOB["SLURM_JOB_ID"]] in job.calls("scontrol")

    def test_every_node_starts_torchrun_with_a_process_for_each_gpu(self, job):
        process = job.start()
        job.end.write_text("0")
        assert process.wait() == 0
        call = job.calls("srun")[0]
        options, config, _ = started(call[call.index("torchrun") + 1 :])
        assert (options.nnodes, options.nproc_per_node) == ("2", "4")
        assert (options.rdzv_backend, options.rdzv_endpoint) == ("c10d", "n1:20123")
        assert config.data.source == "digits"
        assert not self.requeued(job)

    @pytest.mark.parametrize(("status", "requeued"), [("1", True), ("0", False)])
    def test_before_the_time_limit_it_is_stopped_and_queued_again_unless_it_has_ended(self, job, status, requeued):
        process = job.start(ON_SIGNAL=status)
        process.send_signal(signal.SIGUSR1)
        assert process.wait() == int(status)
        assert job.calls("scancel") == [["--signal=TERM", JOB["SLURM_JOB_ID"]]]
        assert self.requeued(job) is requeued

    @pytest.mark.parametrize(
        ("preemption", "requeued"),
        [("PreemptTime=2026-01-01T00:00:00", True), ("PreemptTime=None", False), ("", False)],
    )
    def test_only_a_preempted_job_is_queued_again_when_it_fails(self, job, preemption, requeued):
        process = job.start(PREEMPTION=preemption)
        job.end.write_text("3")
        assert process.wait() == 3
        assert self.requeued(job) is requeued

    def test_it_waits_for_its_processes_when_slurm_ends_it(self, job):
        process = job.start()
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        job.end.write_text("1")
        assert process.wait() == 1

    def test_a_job_that_is_queued_again_keeps_its_log_and_has_time_to_save(self):
        text = (LAUNCH / "slurm.sbatch").read_text()
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
        assert "requeue" in options
        assert options["open-mode"] == "append"
        assert int(options["signal"].removeprefix("B:USR1@")) > int(re.search(r"TIMEOUT:-(\d+)", text)[1])


def documents(name):
    return list(yaml.safe_load_all((LAUNCH / name).read_text(encoding="utf-8")))


def trainer():
    """The pods of kubernetes.yaml: their specification, the command, the processes of each."""
    runtime, job = documents("kubernetes.yaml")
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    jobs = runtime["spec"]["template"]["spec"]
    assert jobs["failurePolicy"]["maxRestarts"] > 0
    (node,) = jobs["replicatedJobs"]
    assert node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    # A pod that fails ends its job, and that starts all of them again.
    spec = node["template"]["spec"]
    pod = spec["template"]["spec"]
    assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    return pod, job["spec"]["trainer"]["command"], job["spec"]["trainer"]["numProcPerNode"]


def operator_v1():
    """The same of kubernetes-v1.yaml."""
    (job,) = documents("kubernetes-v1.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"]["runPolicy"]["backoffLimit"] > 0
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "OnFailure"
    pod = worker["template"]["spec"]
    return pod, pod["containers"][0]["command"], int(job["spec"]["nprocPerNode"])


@pytest.fixture(params=[trainer, operator_v1])
def pods(request):
    pod, command, num_processes = request.param()
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    return SimpleNamespace(
        pod=pod,
        command=command,
        num_processes=num_processes,
        container=container,
        volumes={path: volumes[name] for path, name in mounts.items()},
    )


class TestKubernetes:
    def test_the_run_is_shared_and_the_cache_is_each_pods_own(self, pods):
        assert pods.command[0] == "torchrun"
        _, config, out = started(pods.command[1:])
        assert "persistentVolumeClaim" in pods.volumes[str(out.parent)]
        cache = pods.volumes[config.data.cache_dir]["emptyDir"]
        assert config.data.cache_gb < size(cache["sizeLimit"])

    def test_there_is_a_process_for_each_gpu_and_memory_for_their_batches(self, pods):
        limits = pods.container["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) == pods.num_processes
        shared = pods.volumes["/dev/shm"]["emptyDir"]  # noqa: S108 (where torch's workers put batches)
        assert shared["medium"] == "Memory"
        assert size(shared["sizeLimit"]) < size(limits["memory"])

    def test_pods_have_time_to_save(self, pods):
        environment = {entry["name"]: entry["value"] for entry in pods.container["env"]}
        assert pods.pod["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])

    def test_pods_run_without_privileges_as_the_user_of_the_image(self, pods):
        text = (LAUNCH / "Dockerfile").read_text()
        user = pods.pod["securityContext"]
        assert user["runAsNonRoot"]
        assert str(user["runAsUser"]) == re.search(r"^USER (\d+)$", text, re.MULTILINE)[1]
        assert f"--uid {user['runAsUser']} " in text
        assert pods.container["securityContext"]["allowPrivilegeEscalation"] is False

    def test_what_the_image_is_made_from_is_there(self):
        copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
        assert copied
        assert all((ROOT / name).exists() for names in copied for name in names.split())
