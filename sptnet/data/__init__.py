"""From shards to batches.

The on-disk format:
    manifest      a dataset's shards and classes      fields      the types of what it says
    shard_list    its shards as columns               shard_lines the same, read line by line
    shard_index   which sample lies where in its tar  paths       where samples came from
    files         reading and writing files that others may have prepared

Where it lies:
    store         in a folder or behind a URL         remote      fetching with retries
    cache         fetched files on a node's disk      fetch_ahead fetches that nobody waits for
    pieces        samples of shards still to come     waiting     what a run says while it waits for them

What a step sees:
    order         which samples make its batch, for any number of processes
    keyed         random numbers by key               reader      encoded images by offset
    image, exif   decoding, turning upright, resizing augment     the views
    batches       what a batch holds                  loader      batches of a rank, for training and evaluation
    workers       the loader's processes              on_device   batches on a GPU, the next one ahead

What is computed once over many images, and kept:
    blocks        images in fixed blocks              listing     images in folders and lists
    features      class tokens on disk                table       rows of predictions on disk
    tokens        what enters the first trained block cache_room  room for it among others
    sheet         contact sheets

Imports nothing of `sptnet` but `errors` and `names`. `manifest`, `shard_index`, `paths`, `keyed`, `image`, `sheet` and
what these stand on are all that `shards/` may know. Begin with `order.py`.
"""
