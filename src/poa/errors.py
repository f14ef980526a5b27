"""The errors that poa raises for a user's mistake, and the warning it gives. Imports nothing.

Every message says what is wrong, what was got and how to mend it. The command line prints the message
without a traceback; anything that is not a `PoaError` is a defect of poa and keeps its traceback.
"""

from __future__ import annotations


class PoaError(Exception):
    """Base of all errors that a user can mend.

    Attributes:
        is_told: another process of the run reports it.
    """

    is_told: bool = False


class ConfigError(PoaError):
    """A configuration value is missing, unknown or out of range."""


class SubnetError(PoaError):
    """A sub-network name does not parse, or is not in the search space."""


class DataError(PoaError):
    """A source of images is missing, empty, unreadable or lacks what the command needs."""


class CheckpointError(PoaError):
    """A run directory, checkpoint or family is missing, damaged or does not fit."""


class TrainingError(PoaError):
    """Training cannot go on: losses or gradients stopped being finite."""


class ExtractionError(PoaError):
    """An extracted network does not reproduce the sub-network it was cut from."""


class PoaWarning(UserWarning):
    """Something the user should know; the work goes on."""
