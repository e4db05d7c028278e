"""Shared by all tests: the reference numbers, and a small dataset of real images made by the real tool."""

import os
from pathlib import Path

# One thread, here and in what is started from here: the models are tiny, threads that wait for a core that others have
# cost more than they bring, and what is compared bit for bit must be computed by as many. Read when numpy is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# On the CPU, over gloo, on every machine: worlds of more processes than it has GPUs, compared to the last digits. What
# is about a GPU is marked so, and shows itself one again.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("XDG_CACHE_HOME", None)  # tests that give a home mean the caches below it

import numpy as np
import pytest
import torch
from sptnet_shards.make_shards import main as make_shards

REFERENCE = Path(__file__).parent / "reference"
# minutes each: begun first, so that what is left at the end is short and no core waits for another
LONGEST = (
    "test_world_size.py",
    "test_resume.py",
    "test_trunk_cache.py",
    "test_reading.py",
    "test_remote.py",
    "test_convert.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def reference():
    """`reference(name)`: the path of a reference file; of an .npz, its arrays."""

    def read(name: str):
        path = REFERENCE / name
        return np.load(path) if path.suffix == ".npz" else path

    return read


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The handwritten digits as shards."""
    out = tmp_path_factory.mktemp("shards") / "digits"
    assert make_shards(["digits", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def untrained(digits, tmp_path_factory) -> Path:
    """A run's folder as training leaves it, with a small random model whose classes are the tokens of ten images."""
    from sptnet.build import build_model, build_store
    from sptnet.config_file import load_config
    from sptnet.data.format.files import write_whole
    from sptnet.run.folder import FINISHED, open_run
    from sptnet.run.model_file import ModelFacts, save_model
    from sptnet.trained import TrainedRun

    folder = tmp_path_factory.mktemp("untrained") / "run"
    config = load_config(
        REFERENCE.parents[1] / "configs" / "quickstart.yaml",
        [f"run={folder}", f"data.root={digits}", "init=null", "evaluate.batch_size=50", "data.workers=0",
         "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}"],
    )  # fmt: skip
    folder.mkdir()
    open_run(config, 0)
    manifest = build_store(config).manifest
    facts = ModelFacts(1, "no", manifest.num_old, tuple(manifest.classes))
    model, prompt = build_model(config, manifest)
    save_model(folder, model.state_dict(), prompt, facts)
    run, draws = TrainedRun(folder), np.random.default_rng(0)
    tokens = run.features(list(draws.integers(0, 256, (10, 24, 24), np.uint8)))
    model.head.prototypes.data = torch.from_numpy(tokens - tokens.mean(0))
    save_model(folder, model.state_dict(), prompt, facts)
    write_whole(folder / FINISHED, b"")
    return folder
