"""From the datasets of the field, one's own images and others' tars to WebDataset shards.

    make_shards   the command line                   arguments     what its commands take
    commands      what they do, and what they say    names         what they name, before anything slow is loaded
    source        what a source is                   items         its images, as columns
    sources/      one file per source                conversion/   a source becomes a dataset
    tars/         tars that others made              tar_members   walking through one that may be damaged
    protocol      which classes are old, which images labelled     published   how many images datasets have
    verify        a dataset against its manifest     show          a look at it
    share         which part of the work is whose    workers       processes
    progress      a bar, or plain lines              folder        images below a folder
    whole_numbers as arguments

A script's own folder is where Python looks first: no file here may be called like a module of the standard library.

Imports of `sptnet` the on-disk format and images alone. Begin with `source.py`.
"""
