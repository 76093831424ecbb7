"""A worker: loads a span of blocks, computes it on one thread, and passes hidden states on."""
