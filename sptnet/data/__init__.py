"""From shards to batches.

    format/       the on-disk format                  storage/    where shards lie: a folder, or a URL and a cache

What a step sees:
    order         which samples make its batch, for any number of processes
    keyed         random numbers by key               reader      encoded images by offset
    image, exif   decoding, turning upright, resizing augment     the views
    batches       what a batch holds                  loader      batches of a rank, for training and evaluation
    workers       the loader's processes              on_device   batches on a GPU, the next one ahead
    waiting       what a run says while it waits for shards
    locks         between processes

What is computed once over many images, and kept:
    blocks        images in fixed blocks              listing     images in folders and lists
    features      class tokens on disk                table       rows of predictions on disk
    tokens        what enters the first trained block cache_room  room for it among others
    sheet         contact sheets

Imports nothing of `sptnet` but `errors` and `names`. `format`, `keyed`, `image`, `exif` and `sheet` are all that
`shards/` may know. Begin with `order.py`.
"""
