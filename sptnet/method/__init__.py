"""The paper, as functions and modules of one process: what is learned, what is minimised, how it is scored.

    prompts     the pixels that SPTNet learns and adds to every image
    model       a ViT that takes them, with SimGCD's head
    losses      the objective of both methods
    schedule    which phase a step is of, learning rates, the teacher's temperature
    metrics     clustering accuracy over old and new classes
    kmeans      semi-supervised k-means, the baseline
    whitening   PCA of points that do not fit into memory
    ward        Ward's tree over weighted points
    class_count how many classes there are
    families    which ViTs of timm there are, and how each kind is taken apart
    catalogue   all of them, described
    last_block  what of a last block the class token needs
    weights     backbones from files
    reference   checkpoints of the papers' authors

Knows no processes and no dataset, and imports nothing of `sptnet` but `errors` and `names`. Begin with `prompts.py`;
the two steps that put these together are in `sptnet/steps.py`.
"""
