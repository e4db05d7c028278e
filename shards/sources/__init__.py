"""Sources of images, a file each, and what reading their files needs.

    imagefolder   one folder per class               csv_list      a CSV file that lists images
    discover      some folders are named, the rest is to be sorted
    imagenet      ImageNet-1K and ImageNet-100       cifar         CIFAR-10 and CIFAR-100
    cub, scars, aircraft, herbarium_19   the fine-grained ones
    digits        scikit-learn's, no download
    mat           MATLAB files                       arrays        pickles of which nothing is run

A source has a `SourceCommand` (sptnet_shards/source.py) that `arguments.py` names. Begin with `cub.py`.
"""
