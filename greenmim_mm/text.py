"""Text from files and errors, made fit for a terminal."""

MAX_LENGTH = 200


def printable(text: object, limit: int = MAX_LENGTH) -> str:
    """One line without control characters, which could move the cursor or hide what was printed.

    Args:
        text: Anything; a name or a note of a file may hold any characters at any length.
        limit: Length beyond which it is cut.
    """
    text = ' '.join(str(text).split())
    if len(text) > limit:
        text = text[:limit] + ' ...'
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
