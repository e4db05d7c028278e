"""From a source's images to a dataset, by one task or by several that share the work through files alone.

    convert       each task writes its share, and whoever finds all of them finishes
    scan          which images a source has: found by one task, read by the others
    checks        what a source must be before anything is written
    plan          which samples go into which shard
    images, image_header   encoded images on their way into a shard
    writer        one shard: tar, index, paths       record        what tasks know of each other
    finish        the manifest, of what the records say            duplicates   images that are there twice

Begin with `convert.py`.
"""
