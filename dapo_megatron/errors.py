"""Errors that are meant for the person who started the run; the command line prints their text without a traceback."""


class DapoError(Exception):
    """Something a person can act on. The message says what was given, what was expected, and what to do."""

    exit_code = 1


class ConfigError(DapoError):
    """The input of a run cannot work: a config key, a file, a size. Raised before any process is started."""

    exit_code = 2


class LossError(DapoError, TypeError):
    """A loss gave something else than a value for each slot and what it says that it measures."""


class EngineError(DapoError):
    """A rollout engine did not start, died, or answered with an error.

    Attributes:
        engine: the name of the one that is at fault, where several had a part in what failed and one is known to be.
    """

    engine: str | None = None


class RefusedError(EngineError):
    """A rollout engine works, and refuses a request: it would refuse it again."""


class WeightsError(EngineError):
    """A rollout engine samples with other weights than it was sent. It would do so again."""


class StorageError(EngineError):
    """Weights cannot be written where engines would read them: no engine is at fault, and all keep what they have."""


class RolloutError(DapoError):
    """The rollout could not be filled, for example because too few groups were mixed."""


class GradingError(DapoError):
    """The processes that grade responses could not be started, or were closed while grading."""
