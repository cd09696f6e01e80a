"""The exceptions that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message names the value, the cause and the fix.

    The command line prints it as one line without a traceback and exits with status 2.
    """


class PeerError(UserError):
    """A UserError of rank 0, on the other ranks: they end with it and stay silent."""
