"""Compiled kernels for CPUs. Each is optional: without a compiler at installation torch's operators do the same."""
