"""Every error the package raises on purpose.

One base class, one subclass per kind of fault, one sentence per message: what was expected and what came.
"""

from __future__ import annotations


class FlexLAMError(Exception):
    """Base of every deliberate error; catching it catches all of them and nothing else."""

    #: What a command that ends with this error returns to the shell.
    exit_status = 2


class ConfigError(FlexLAMError, ValueError):
    """A configuration that no model can be built from."""


class InputError(FlexLAMError, ValueError):
    """A tensor, frame or argument of the wrong shape, dtype, device or value."""


class BudgetError(InputError):
    """A budget ``k`` outside the range a call accepts."""


class BackendError(FlexLAMError, RuntimeError):
    """A backend that was asked for by name and cannot run here."""


class CheckpointError(FlexLAMError, RuntimeError):
    """A checkpoint that is corrupt, truncated, foreign, or of a version this package does not read."""


class DataError(FlexLAMError, RuntimeError):
    """A dataset, episode or video that cannot be read, or holds nothing to read."""


class SimulatorError(FlexLAMError, RuntimeError):
    """A simulator that is missing or refuses to start."""


class StorageError(FlexLAMError, OSError):
    """A write that did not reach the disk: full, read-only, or forbidden."""


class CacheError(FlexLAMError, RuntimeError):
    """A key-value cache that is full, or was used out of order."""
