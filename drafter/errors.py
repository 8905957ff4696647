"""The one exception that entry points print without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something a user can mend: the message says what is wrong, where, and what to do."""
