"""From shards on disk to batches: manifest -> order -> reader -> augment -> loader."""
