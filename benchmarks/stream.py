"""Whether images in shards behind a web server stream with bounded memory, and none is lost or repeated.

    python benchmarks/stream.py --json result.json

Images are made and packed into tar shards, which a web server of this process serves. Two processes share every batch
as two ranks do, each with two workers that decode and augment. In the middle of the epoch both are killed; two new ones
go on at the last step that a checkpoint would have had. Recorded: how often each image came in the epoch, how often and
how many bytes of each shard were fetched, the most that the cache held, and the largest memory of all processes
together (the sum of their proportional set sizes, and the anonymous part of it). The same with a tenth of the images
shows whether memory grows with their number. Takes about five minutes on two cores; Linux only.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from machine import describe_machine
from PIL import Image

from poa.config import AugmentConfig, DataConfig, PretrainConfig, TrainConfig, ViTConfig
from poa.data import BatchStream, EpochPlan, MultiCropBatches, open_source
from poa.data.shards import INDEX_NAME, build_index
from poa.distributed import Ranks
from poa.randomness import generator

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_RANKS = 2

MOST_GROWTH_MIB = 32.0
"""How much more anonymous memory all processes together may need for ten times the images."""


@dataclass(frozen=True)
class Sizes:
    """What is streamed, and how."""

    num_images: int = 200_000
    images_per_shard: int = 1_000
    window: int = 8
    batch_size: int = 400
    checkpoint_every: int = 20
    num_workers: int = 2

    @property
    def num_shards(self) -> int:
        """Shards of the set."""
        return self.num_images // self.images_per_shard


def write_shards(folder: Path, sizes: Sizes) -> None:
    """Shards of PNG images of 8 × 8 random pixels, and their index."""
    folder.mkdir()
    for shard in range(sizes.num_shards):
        pixels = generator(0, "pixels", shard).integers(0, 256, (sizes.images_per_shard, 8, 8), np.uint8)
        with tarfile.open(folder / f"s-{shard:04d}.tar", "w") as archive:
            for number, grey in enumerate(pixels):
                stream = io.BytesIO()
                Image.fromarray(grey).save(stream, "PNG", compress_level=1)
                member = tarfile.TarInfo(f"{shard:04d}-{number:05d}.png")
                member.size = stream.tell()
                archive.addfile(member, io.BytesIO(stream.getvalue()))
    build_index(str(folder), DataConfig()).save(folder / INDEX_NAME)


class Server(ThreadingHTTPServer):
    """Serves a folder and counts."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.requests: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class _Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:  # noqa: ANN401 (files)
        name = self.path.lstrip("/")
        self.server.requests[name] += 1
        while content := source.read(2**16):
            outputfile.write(content)
            self.server.num_bytes[name] += len(content)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Watch:
    """The largest memory of some processes and those that they started, and the most that a folder held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.roots: list[int] = []
        self.peak_pss_mib = self.peak_anonymous_mib = self.peak_cache_mib = 0.0
        self.num_processes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.25):
            found = [_memory(pid) for root in self.roots for pid in _family(root)]
            self.num_processes = max(self.num_processes, len(found))
            self.peak_pss_mib = max(self.peak_pss_mib, sum(pss for pss, _ in found) / 1024)
            self.peak_anonymous_mib = max(self.peak_anonymous_mib, sum(own for _, own in found) / 1024)
            self.peak_cache_mib = max(self.peak_cache_mib, _bytes_in(self.folder) / 2**20)


def _family(root: int) -> list[int]:
    file = Path(f"/proc/{root}/task/{root}/children")
    try:
        children = [int(pid) for pid in file.read_text().split()]
    except OSError:
        return []
    return [root, *(pid for child in children for pid in _family(child))]


def _memory(pid: int) -> tuple[int, int]:
    """Proportional set size, and the anonymous part of it, in KiB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    figures = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return figures.get("Pss", 0), figures.get("Pss_Anon", figures.get("Anonymous", 0))


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.glob("*") if folder.exists() else ():
        try:
            total += file.stat().st_size if file.suffix in (".tar", ".part") else 0
        except OSError:
            continue
    return total


def config_of(sizes: Sizes, url: str, cache: Path) -> PretrainConfig:
    """A run on the shards with a cache for two windows."""
    shard_bytes = sizes.images_per_shard * 1024 + 2 * 10240
    data = DataConfig(
        source=f"{url}/s-{{0000..{sizes.num_shards - 1:04d}}}.tar",
        cache_dir=str(cache),
        cache_gb=2 * sizes.window * shard_bytes / 1e9,
        window=sizes.window,
    )
    return PretrainConfig(
        data=data,
        model=ViTConfig(widths=(16,), depths=(1,), head_dim=8, patch_size=2, image_size=8, num_channels=1),
        augment=AugmentConfig(num_local_crops=0, local_size=4, mean=(0.5,), std=(0.5,)),
        train=TrainConfig(batch_size=sizes.batch_size),
    )


def stream_as_rank(rank: int, sizes: Sizes, config: PretrainConfig, first: int, shown: Path) -> None:
    """Takes a rank's batches of one epoch from a step on; writes which images they had, one line for each step."""
    source = open_source(config.data.source, config.data, 1)
    plan = EpochPlan.of(source, config, Ranks(rank, NUM_RANKS, rank, NUM_RANKS))
    batches = MultiCropBatches(source, plan, config)
    steps = np.memmap(config.data.cache_dir + "-steps", np.int64, "r+", shape=(NUM_RANKS,))
    begin = time.monotonic()
    with (
        BatchStream(batches, first, plan.steps_per_epoch, sizes.num_workers, pin_memory=False) as stream,
        shown.open("a", encoding="utf-8", buffering=1) as file,
    ):
        for step, batch in enumerate(stream, start=first):
            file.write(json.dumps([step, batch.indices.tolist()]) + "\n")
            wait_for_all(steps, rank, step)
        seconds = time.monotonic() - begin
    print(json.dumps({"seconds": seconds, "waited_seconds": stream.waited_seconds, "num_images": len(source)}))


def wait_for_all(steps: np.ndarray, rank: int, step: int) -> None:
    """Goes on when every rank has done the step, as training does."""
    steps[rank] = step
    while int(steps.min()) < step:
        time.sleep(0.001)


def start(rank: int, sizes: Sizes, config: PretrainConfig, first: int, shown: Path) -> subprocess.Popen[str]:
    arguments = {
        "rank": rank,
        "sizes": asdict(sizes),
        "url": config.data.source.rpartition("/")[0],
        "cache": config.data.cache_dir,
        "first": first,
        "shown": str(shown),
    }
    command = [sys.executable, __file__, "--as-rank", json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def steps_in(file: Path) -> dict[int, list[int]]:
    """The images of every step that is written whole."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return dict(map(json.loads, lines))


def run(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """One epoch, interrupted and gone on with."""
    write_shards(folder / "shards", sizes)
    parts = [[folder / f"{part}-{rank}.jsonl" for rank in range(NUM_RANKS)] for part in ("before", "after")]
    num_steps = sizes.num_images // sizes.batch_size
    watch = Watch(folder / "cache")
    with serving(folder / "shards") as server:
        config = config_of(sizes, f"http://127.0.0.1:{server.server_port}", folder / "cache")
        np.full(NUM_RANKS, -1).tofile(config.data.cache_dir + "-steps")
        running = [start(rank, sizes, config, 0, parts[0][rank]) for rank in range(NUM_RANKS)]
        watch.roots = [process.pid for process in running]
        while min(len(steps_in(file)) for file in parts[0]) < num_steps // 2:
            if any(process.poll() is not None for process in running):
                raise SystemExit("a process ended before it was interrupted")
            time.sleep(0.5)
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        before = [steps_in(file) for file in parts[0]]
        done = min(map(len, before)) // sizes.checkpoint_every * sizes.checkpoint_every
        requests_before = Counter(server.requests)
        np.full(NUM_RANKS, done - 1).tofile(config.data.cache_dir + "-steps")
        running = [start(rank, sizes, config, done, parts[1][rank]) for rank in range(NUM_RANKS)]
        watch.roots = [process.pid for process in running]
        ends = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    watch.close()
    after = [steps_in(file) for file in parts[1]]
    shown = [image for own in before for step, images in own.items() if step < done for image in images]
    shown += [image for own in after for images in own.values() for image in images]
    times = np.bincount(shown, minlength=sizes.num_images)
    names = [name for name in server.requests if name.endswith(".tar")]
    in_one = [max(requests_before[name], server.requests[name] - requests_before[name]) for name in names]
    shard_bytes = sum(file.stat().st_size for file in (folder / "shards").glob("*.tar"))
    return {
        **asdict(sizes),
        "interrupted_after_steps": min(map(len, before)),
        "went_on_at_step": done,
        "num_steps": num_steps,
        "images_shown_once": int((times == 1).sum()),
        "images_lost": int((times == 0).sum()),
        "images_repeated": int((times > 1).sum()),
        "shards_mib": shard_bytes / 2**20,
        "fetched_mib": sum(server.num_bytes[name] for name in names) / 2**20,
        "fetches_of_a_shard_by_one_start": dict(Counter(in_one)),
        "cache_bound_mib": config.data.cache_gb * 1e9 / 2**20,
        "peak_cache_mib": watch.peak_cache_mib,
        "num_processes": watch.num_processes,
        "peak_pss_mib": watch.peak_pss_mib,
        "peak_anonymous_mib": watch.peak_anonymous_mib,
        "second_start": ends,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=Sizes.num_images)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        given = json.loads(options.as_rank)
        sizes = Sizes(**given["sizes"])
        config = config_of(sizes, given["url"], Path(given["cache"]))
        stream_as_rank(given["rank"], sizes, config, given["first"], Path(given["shown"]))
        return 0
    found = {}
    for name, num_images in (("a tenth", options.num_images // 10), ("all", options.num_images)):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(Sizes(num_images=num_images), Path(folder))
        print(name, json.dumps(found[name], indent=2), flush=True)
    growth = {
        key: found["all"][key] - found["a tenth"][key]
        for key in ("peak_pss_mib", "peak_anonymous_mib", "peak_cache_mib")
    }
    print("growth", json.dumps(growth), flush=True)
    if options.json:
        record = {"date": datetime.now(UTC).date().isoformat(), "machine": describe_machine(), "runs": found}
        record |= {"growth": growth, "most_growth_anonymous_mib": MOST_GROWTH_MIB}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    whole = found["all"]
    is_bounded = growth["peak_anonymous_mib"] <= MOST_GROWTH_MIB and whole["peak_cache_mib"] <= whole["cache_bound_mib"]
    return 0 if is_bounded and whole["images_shown_once"] == whole["num_images"] else 1


if __name__ == "__main__":
    sys.exit(main())
