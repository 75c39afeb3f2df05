"""The one place that knows the version; imports nothing, so `pqcli --version` is instant."""

__version__ = "0.1.0"
