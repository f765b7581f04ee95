"""Files: reading checkpoints and adapters, writing shards, publishing a folder whole."""
