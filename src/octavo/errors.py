"""What octavo raises.

A message says what was asked, which value, why not, and the way out.
"""


class OctavoError(Exception):
    """Base of everything octavo raises on purpose."""


class UserError(OctavoError, ValueError):
    """A mistake the user can mend: the command line prints the message and exits with status 2."""


class MissingExtra(UserError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(f"{needed_for} needs the package '{package}': install it with  pip install 'octavo[{extra}]'")


class VerificationError(OctavoError):
    """Files that were written do not mean what was simulated."""
