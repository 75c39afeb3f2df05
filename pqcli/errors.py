"""The error tree: every failure pqcli foresees, and the exit code the command line gives it.

The inside raises the bare fact (`what`), the border adds the place. A message says what is wrong, where, with the
numbers, and what to do. Anything that is not a `PQError` is a bug in pqcli.
"""

from __future__ import annotations


class PQError(Exception):
    """Root of the tree. Exit code 1."""

    exit_code = 1


class UsageError(PQError):
    """A flag or an argument that cannot be meant. Exit code 2."""

    exit_code = 2


class CheckFailedError(PQError):
    """A check the user asked for did not hold (`verify`, `report --fail-above`). Exit code 3."""

    exit_code = 3


class CheckpointError(PQError):
    """A checkpoint that cannot be read, or is not one."""


class RecipeError(PQError):
    """A recipe that cannot be parsed, or whose patterns match nothing."""


class ContainerError(PQError):
    """A `.pq.safetensors` file that is damaged, or written by a newer pqcli."""


class DamagedError(ContainerError):
    """A `.pq.safetensors` file that cannot be what pqcli wrote: damaged, or made by someone else."""


class BaseError(ContainerError):
    """A `.pq.safetensors` file whose base, to which it holds differences, is missing or another one."""


class StatsError(PQError):
    """Statistics that are damaged, that do not fit the model, or that cannot be collected."""


class OutputError(PQError):
    """An output that exists already, or cannot be written."""


class JournalError(PQError):
    """An output that a killed run, of another command, was at: its journal does not fit. Exit code 4."""

    exit_code = 4


class WorkerError(PQError):
    """Workers in other processes, or on other machines, that are lost again and again."""


class MissingExtraError(PQError):
    """An optional package is needed and not installed; the message names the pip command."""


class NotBuiltError(PQError):
    """The loops in C were not compiled, or not for this machine; the message says how to."""


class EmptyClusterResolveError(PQError):
    """Splitting populated clusters could not fill every empty one within `max_tentatives` passes."""
