"""From shards to batches.

    manifest      the on-disk format                  store       a dataset in a folder or behind a URL
    remote        fetching with retries               cache       fetched files on a node's disk
    order         which samples make a step's batch, for any number of processes
    keyed         random numbers by key               reader      encoded images by offset
    image         decoding and resizing               augment     the views of a step
    loader        batches for training and evaluation
    blocks        fixed blocks of images, for features and predictions
    listing       folders and CSV lists of images     features    class tokens, kept
    table         CSV and Parquet

Imports nothing of `sptnet` but `errors`; `manifest`, `keyed` and `image` are what `shards/` may know.
Begin with `order.py`.
"""
