"""The exceptions that a user is meant to read."""

from __future__ import annotations

USER_ERROR = 2
"""Exit status after a UserError"""


class UserError(ValueError):
    """Something the user can mend: the message names the value, the cause and the fix.

    The command line prints it as one line without a traceback.
    """


class PeerError(UserError):
    """Another rank or process failed and tells why; this one ends with it and stays silent."""


class Interrupted(Exception):
    """A signal asked the run to end. The message is rank 0's to tell."""
