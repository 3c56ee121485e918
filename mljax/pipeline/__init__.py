"""From files to batches: decoding, augmentation, loading, cached features, packed shards."""
