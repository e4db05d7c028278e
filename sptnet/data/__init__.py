"""From shards to batches.

    manifest      the on-disk format                  fields      the types of what it says
    shard_index   which sample lies where in its tar  paths       where samples came from
    files         reading and writing files that others may have prepared
    store         a dataset in a folder or behind a URL
    remote        fetching with retries               cache       fetched files on a node's disk
    fetch_ahead   fetches that nobody waits for
    order         which samples make a step's batch, for any number of processes
    keyed         random numbers by key               reader      encoded images by offset
    image, exif   decoding, turning upright, resizing augment     the views of a step
    loader        batches for training and evaluation
    blocks        images in fixed blocks, for what is computed once over many of them
    listing       images in folders and lists         features    class tokens on disk
    table         rows of predictions on disk

Imports nothing of `sptnet` but `errors`. `manifest`, `keyed`, `image` and what these stand on are all that `shards/`
may know. Begin with `order.py`.
"""
