"""The one exception that entry points print without a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Something a user can mend: the message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Prints a UserError as one line on stderr, without a traceback, and exits with code 2."""
    try:
        yield
    except UserError as error:
        # a progress bar may have left the cursor in a line
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
