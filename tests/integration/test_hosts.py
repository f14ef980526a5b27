"""Two hosts: network namespaces of this machine, joined by a cable, each with the line of launch/torchrun.sh.

They need root and `ip` (iproute2). Where these are missing the tests are skipped, or fail if POA_REQUIRE_NETNS is set.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.test_pretrain_cli import TINY

TORCHRUN = Path(__file__).resolve().parents[2] / "launch" / "torchrun.sh"
BIN = Path(sys.executable).parent
PATIENCE = 240
RUN = (
    *("--recipe", "digits", "--config", "tiny.yaml", "--data", "digits", "--train.epochs", "2"),
    *("--train.checkpoint-every", "10", "--monitor.every", "0", "--runtime.watchdog-minutes", "0.2"),
)

pytestmark = pytest.mark.slow


def environment(**names):
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | names


class Host:
    """A network namespace with one process of a run in it.

    Args:
        number: its address is 10.77.0.number; the hosts meet at the first one.
        folder: where it runs; the hosts share it.
    """

    def __init__(self, number, folder):
        self.number = number
        self.folder = folder
        self.name = f"poa-{secrets.token_hex(4)}-{number}"
        self.log = folder / f"host-{number}.log"
        self.process = None

    def __enter__(self):
        subprocess.run(["ip", "netns", "add", self.name], check=True, capture_output=True)
        return self

    def __exit__(self, *error):
        self.lose_power()
        subprocess.run(["ip", "netns", "delete", self.name], check=True)

    def ip(self, *words):
        subprocess.run(["ip", "-n", self.name, *words], check=True)

    def plug_in(self):
        self.ip("address", "add", f"10.77.0.{self.number}/24", "dev", "cable")
        for device in ("lo", "cable"):
            self.ip("link", "set", device, "up")

    def start(self):
        names = environment(
            RDZV_ENDPOINT="10.77.0.1:29400",
            NNODES="2",
            NPROC_PER_NODE="1",
            PET_LOCAL_ADDR=f"10.77.0.{self.number}",
            PET_RDZV_CONF=f"is_host={self.number == 1}",
            GLOO_SOCKET_IFNAME="cable",
        )
        command = ["ip", "netns", "exec", self.name, TORCHRUN, *RUN, "--out", "run"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=names, stdout=log, stderr=log)

    def ends_well(self):
        return self.process.wait(PATIENCE) == 0

    def lose_power(self):
        found = subprocess.run(["ip", "netns", "pids", self.name], check=True, capture_output=True, text=True)
        for pid in map(int, found.stdout.split()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process is not None:
            self.process.wait()


@pytest.fixture
def hosts(tmp_path):
    missing = [what for what, there in (("root", os.geteuid() == 0), ("ip", shutil.which("ip"))) if not there]
    required = os.environ.get("POA_REQUIRE_NETNS")
    if missing and not required:
        pytest.skip(f"network namespaces need {' and '.join(missing)}")
    assert not missing, f"POA_REQUIRE_NETNS is set, and there is no {' and no '.join(missing)}"
    (tmp_path / "tiny.yaml").write_text(TINY)
    with ExitStack() as stack:
        try:
            one, two = (stack.enter_context(Host(number, tmp_path)) for number in (1, 2))
        except subprocess.CalledProcessError as error:
            if required:
                raise
            pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
        one.ip("link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", two.name)
        for host in (one, two):
            host.plug_in()
            host.start()
        yield one, two


@pytest.fixture(scope="module")
def weights_of_one_host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-host")
    (folder / "tiny.yaml").write_text(TINY)
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "poa", "pretrain", *RUN, "--out", "run"]
    found = subprocess.run(command, check=False, cwd=folder, env=environment(), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return weights(folder)


def weights(folder):
    return (folder / "run" / "family" / "weights.safetensors").read_bytes()


def wait_until(condition, host):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert host.process.poll() is None, host.log.read_text()
        assert time.monotonic() < deadline, host.log.read_text()
        time.sleep(0.05)


def wait_for_checkpoint(host):
    wait_until(lambda: any((host.folder / "run" / "checkpoints").glob("step-*")), host)


def assert_end(hosts, expected):
    assert all(host.ends_well() for host in hosts), "\n".join(host.log.read_text() for host in hosts)
    assert weights(hosts[0].folder) == expected


def test_two_hosts_learn_what_two_processes_of_one_host_learn(hosts, weights_of_one_host):
    assert_end(hosts, weights_of_one_host)


def test_a_run_goes_on_from_its_checkpoint_when_a_host_is_lost_and_returns(hosts, weights_of_one_host):
    one, two = hosts
    wait_for_checkpoint(one)
    two.lose_power()
    two.start()
    assert_end(hosts, weights_of_one_host)
    log = one.log.read_text()
    assert "another process of the run has ended" in log
    assert "Resuming after step" in log


def test_a_run_goes_on_from_its_checkpoint_when_the_network_was_away(hosts, weights_of_one_host):
    one, two = hosts
    wait_for_checkpoint(one)
    two.ip("link", "set", "cable", "down")
    wait_until(lambda: len(list((one.folder / "run").glob("hangs/*"))) >= len(hosts), one)
    two.ip("link", "set", "cable", "up")
    assert_end(hosts, weights_of_one_host)
    assert all("made no progress" in host.log.read_text() for host in hosts)
