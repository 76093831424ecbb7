"""Weights that are read from disk while the stage computes: a ring for blocks, a cache for experts."""
