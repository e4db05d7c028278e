"""A real HTTP server of shards that fails, stalls, truncates and holds back as it is told; and what is read from it."""

import http.server
import re
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from sptnet.build import build_data
from sptnet.config_file import load_config
from sptnet.data.loader import train_batches

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart_simgcd.yaml"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder.

    `faults` maps a file name to what goes wrong with its next requests; `served` counts requests of whole files,
    `missed` all of files that are not there; `parts` lists names and bytes of those of parts, which are sent where
    `sends_parts`, with `damaged` bytes, and whole files else. Shards are held back until `released`.
    """

    daemon_threads = True
    request_queue_size = 256  # two workers ask for 48 parts each at once; of what finds no place some wait for seconds

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.faults, self.served, self.missed = root, {}, Counter(), Counter()
        self.parts, self.sends_parts, self.damaged = [], False, range(0)
        self.released = threading.Event()
        self.released.set()
        self.url = f"http://127.0.0.1:{self.server_port}/digits"

    def handle_error(self, request, client_address):
        pass  # clients that give up are part of these tests


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        name = self.path.rpartition("/")[2]
        path = self.server.root / name
        if not path.is_file() or self.path != f"/digits/{name}":
            self.server.missed[name] += with_body
            return self.send_error(404)
        fault = None
        if with_body and (part := self.headers.get("Range")):
            begin, end = (int(number) for number in re.fullmatch(r"bytes=(\d+)-(\d+)", part).groups())
            self.server.parts.append((name, end + 1 - begin))
            if self.server.sends_parts:
                return self.send_part(path.read_bytes(), begin, end + 1)
        elif with_body:
            self.server.served[name] += 1
            if name.endswith(".tar"):
                self.server.released.wait(30)
            faults = self.server.faults.get(name, [])
            fault = faults.pop(0) if faults else None
        if fault == "fail":
            return self.send_error(503)
        content = path.read_bytes()
        if fault == "corrupt":
            content = bytes(len(content))
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not with_body:
            return None
        if fault in ("truncate", "stall"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(8)
            self.close_connection = True
            return None
        return self.wfile.write(content)

    def send_part(self, content, begin, end):
        part = bytearray(content[begin:end])
        for number in self.server.damaged:
            if number < len(part) and len(part) > 2:
                part[number] ^= 255
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)


def data_of(root, cache, *extra):
    settings = [f"data.root={root}", "data.batch_size=48", f"data.remote.cache={cache}", "data.remote.timeout_s=2"]
    return build_data(load_config(CONFIG, [*settings, *extra]))


def batches(store, order, steps=range(8), **options):
    return list(train_batches(store, order, augment="affine", image_size=24, seed=0, steps=steps, **options))


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a.views, b.views) and np.array_equal(a.uids, b.uids) for a, b in zip(one, other, strict=True)
    )
