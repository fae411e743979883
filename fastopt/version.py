"""The version of fastopt."""

__version__ = "0.1.0"
