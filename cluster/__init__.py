"""Spanwise: what everyone shares and what a user imports. See ARCHITECTURE.md for the map."""

from cluster.version import PROTOCOL_VERSION, VERSION

__version__ = VERSION
__all__ = ["PROTOCOL_VERSION", "VERSION", "__version__"]
