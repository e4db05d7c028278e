"""WebDataset tars that others made: they stay as they are, in a folder or behind a URL, and get indexes and a manifest.

    index         what is made, and in what order    indexing      what tasks that share the work must agree on
    members       images and labels of a tar, found in one pass     places   where the tars lie

Begin with `index.py`.
"""
