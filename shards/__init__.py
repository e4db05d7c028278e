"""From the datasets of the field to WebDataset shards."""
