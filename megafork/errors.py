"""The exceptions that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message names the value, the cause and the fix.

    The command line prints it as one line without a traceback and exits with status 2.
    """


class PeerError(UserError):
    """Rank 0 failed and tells why; the other ranks end with this and stay silent."""


class OnEveryRank(Exception):
    """Raised by rank 0's part of the work, and then on all ranks: all have to act on it."""


class Interrupted(OnEveryRank):
    """A signal asked the run to end. The message is rank 0's to tell."""


class ServerDied(OnEveryRank):
    """The rollout server is gone, or is not the one that has the policy's weights."""
