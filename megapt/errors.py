"""The one exception whose message is meant for a user rather than for a developer."""

from __future__ import annotations


class UserError(ValueError):
    """A rule was broken by what the user gave: the message names the rule, the values and the nearest legal ones.

    Commands print the message alone, without a traceback, and exit with status 2.
    """
