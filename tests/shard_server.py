"""Shards of small images, and a web server for them that misbehaves as it is told."""

import io
import tarfile
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from poa.config import DataConfig
from poa.data.shards import INDEX_NAME, build_index
from tests.hostile_images import encoded, picture


def tar_of(names, shift=0, modified=0):
    """An archive with a small picture of its own under every name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for place, name in enumerate(names):
            content = encoded(picture(8 + (place + shift) % 40, 9), "PNG")
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), modified
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def parquet_of(count, shift=0, group=2):
    """A Parquet file with pictures, one row without, and labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [encoded(picture(8 + (place + shift) % 40, 9), "PNG") for place in range(count)]
    cells.insert(1, None)
    labels = [place % 2 for place in range(len(cells))]
    stream = io.BytesIO()
    table = pa.table({"image": pa.array(cells, pa.binary()), "label": labels})
    pq.write_table(table, stream, row_group_size=group)
    return stream.getvalue()


def write_tars(folder, sizes, modified=0):
    """Archives `s-0000.tar`, … of so many pictures each, in two classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        names = [f"class {place % 2}/{place}.png" for place in range(size)]
        (folder / f"s-{number:04d}.tar").write_bytes(tar_of(names, shift=7 * number, modified=modified))
    return folder


def write_index(folder, **options):
    """The index of the shards in a folder, beside them."""
    index = build_index(str(folder), DataConfig(**options))
    index.save(folder / INDEX_NAME)
    return index


class ShardServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    `faults` maps a file's name to what goes wrong in its next requests, one after the other: a status, "torn",
    "flipped", "stalled" or "dropped". `requests` counts them.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults, self.requests = folder, {}, Counter()
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.slowness = 0.0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that go away are no news."""


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *message):
        pass

    def do_GET(self):
        name = self.path.lstrip("/")
        with self.server.lock:
            self.server.requests[name] += 1
            faults = self.server.faults.get(name, [])
            fault = faults.pop(0) if faults else None
        file = self.server.folder / name
        if isinstance(fault, int) or not file.exists():
            self.send_error(fault or 404)
            return
        self.server.closing.wait(self.server.slowness)
        if file.is_dir():
            content = "".join(f'<a href="{entry.name}">' for entry in file.iterdir()).encode()
        else:
            content = file.read_bytes()
        if fault == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "text/html" if file.is_dir() else "application/octet-stream")
        self.end_headers()
        if fault is None or fault == "flipped":
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2 if fault != "dropped" else 0])
        self.wfile.flush()
        if fault == "stalled":
            self.server.closing.wait(30)


@contextmanager
def serving(folder):
    """The server, while the block runs."""
    with ShardServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
