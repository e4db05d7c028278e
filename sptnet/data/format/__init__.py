"""The on-disk format of datasets, all of it that `shards/` knows beside images.

    manifest      a dataset's shards and classes      fields      the types of what it says
    shard_list    its shards as columns               shard_lines the same, read line by line
    shard_index   which sample lies where in its tar  paths       where samples came from
    shard_text    columns as JSON, for their digest   files       reading and writing files, also hostile ones
    presence      whether all files are there         temporary   names of files that are being written
    faults        what may be wrong with a dataset

Begin with `manifest.py`.
"""
