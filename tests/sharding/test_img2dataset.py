"""Tars of the real img2dataset, in an environment of its own, from a web server on this machine."""

import csv
import functools
import http.server
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from sptnet_shards.make_shards import main

from sptnet.data.format.manifest import KINDS, read_manifest
from sptnet.data.storage.store import LocalStore

LABELS = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def img2dataset(tmp_path_factory):
    """Its program. It wants webdataset below 0.3, so it cannot stand beside ours."""
    home = tmp_path_factory.mktemp("img2dataset")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    installed = subprocess.run(
        [str(home / "bin" / "pip"), "install", "-q", "img2dataset"], capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"img2dataset cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    return home / "bin" / "img2dataset"


@pytest.fixture
def served(tmp_path):
    """A list of 60 images behind http://127.0.0.1, one of which is not there; the last 20 are of no class."""
    (tmp_path / "www").mkdir()
    draws = np.random.default_rng(0)
    for i in range(60):
        if i != 7:
            Image.fromarray(draws.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / "www" / f"{i}.jpg")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open(tmp_path / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["url", "caption", "label"])
        for i in range(60):
            label = LABELS[i % 3] if i < 40 else ""
            rows.writerow([f"http://127.0.0.1:{server.server_port}/{i}.jpg", f"image {i}", label])
    yield tmp_path / "list.csv"
    server.shutdown()


@pytest.mark.slow
def test_what_img2dataset_wrote_is_indexed_as_it_is(img2dataset, served, tmp_path):
    out = tmp_path / "tars"
    command = [
        str(img2dataset), f"--url_list={served}", "--input_format=csv", "--url_col=url", "--caption_col=caption",
        '--save_additional_columns=["label"]', f"--output_folder={out}", "--output_format=webdataset",
        "--processes_count=2", "--thread_count=8", "--image_size=32", "--number_sample_per_shard=20",
        "--enable_wandb=False",
    ]  # fmt: skip
    ran = subprocess.run(
        command, capture_output=True, text=True, env={"NO_ALBUMENTATIONS_UPDATE": "1", "PATH": "/usr/bin:/bin"}
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert {path.suffix for path in out.iterdir()} >= {".tar", ".parquet", ".json"}
    for task in ("0/2", "1/2"):
        assert main(["index", str(out), "--task", task]) == 0
    manifest = read_manifest(out)
    assert (manifest.classes, manifest.unknown) == (list(LABELS), True)
    assert [manifest.samples(kind) for kind in KINDS] == [39, 20, 0]
    store = LocalStore(out)
    counts = np.bincount(np.concatenate([store.entries(shard)["target"] for shard in manifest.of_kind("labelled")]))
    assert counts.tolist() == [14, 12, 13]
    assert main(["verify", str(out), "--decode"]) == 0
