"""Attention with a table of the distances, RMSNorm and dropout in C++, for CPUs: `load()` loads them, and builds them
first where need be.

The models find this package where it is installed, and compute the same in operations of torch where it is not.
"""

from .build import NativeError
from .library import INTERFACE, Library, load


__all__ = ["INTERFACE", "Library", "NativeError", "load"]
