"""The command `python -m flowdiffrax.testing`."""

import sys
from collections.abc import Sequence

from ._command import check_line, parser
from ._failure import IdentityError


def main(line: Sequence[str] | None = None) -> int:
    """Prints a report, or the failures. Returns the exit status: 1 for failures."""
    made = parser("python -m flowdiffrax.testing")
    options = made.parse_args(line)
    try:
        print(check_line(options))
    except IdentityError as error:
        print(error, file=sys.stderr)
        return 1
    except (ImportError, OSError, TypeError, ValueError) as error:
        made.error(" ".join(str(error).split()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
