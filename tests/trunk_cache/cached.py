"""A short run whose last block is trained, with and without its trunk's tokens kept."""

from launching import ROOT

# 11 steps per epoch; a frozen block before the one that is trained
SMALL = ["schedule.epochs=4", "data.batch_size=128", "data.views=3", "data.workers=0", "evaluate.every=2",
         "checkpoint.every=4", "log_every=1", "optimizer.name=sgd", "optimizer.lr=0.05", "model.train_from_block=-1",
         "model.backbone_options={patch_size: 6, embed_dim: 48, depth: 2, num_heads: 3}", "trackers=[]"]  # fmt: skip
STEPS = 44


def arguments(run, data, cache, *extra):
    settings = [f"run={run}", f"data.root={data}", f"trunk_cache={cache}", *SMALL, *extra]
    return ["train", f"{ROOT}/configs/quickstart_simgcd.yaml", *settings]


def folder_in(cache):
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return folder


def content(cache):
    """Names and bytes of the parts of the one folder of a cache."""
    folder = folder_in(cache)
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*-0*")) if path.suffix != ".lock"}
