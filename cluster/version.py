"""The package version and the protocol version, readable without importing anything else."""

VERSION = "0.1.0"

PROTOCOL_VERSION = 1
"""Rises when a client or worker of the previous number can no longer be understood."""
