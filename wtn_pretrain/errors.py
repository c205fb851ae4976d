"""The one error that a user sees as a line instead of a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: names the thing, where it stands and the remedy, in one line."""


class Preempted(Exception):
    """A stage was left early, on demand, with all that it has done kept: the same command continues it."""
