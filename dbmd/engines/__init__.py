"""The stores dbmd can stand on, one module each behind ``dbmd.storage``, and how every one of them refuses to open."""

from __future__ import annotations


class OpenRefusedError(Exception):
    """
    A store was not opened, and nothing in it was changed that its owner would miss.

    ``kind`` tells callers what to do, the message tells people: "missing" (the parent directory,
    or the path itself, is not there), "held" (another handle has it; ``holder_pid`` is the
    process, where that can be known), "damaged" (opening would lose data), "foreign" (not a
    database of ours or the original's) or "unreadable" (the operating system says no).
    """

    def __init__(self, kind: str, message: str, *, holder_pid: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.holder_pid = holder_pid


def damaged(path: str, what: str) -> OpenRefusedError:
    """Return the refusal of a damaged directory, with the way out."""
    return OpenRefusedError(
        "damaged",
        f"{path} is damaged: {what}. Nothing in it was changed; `dbmd repair {path} COPY` saves what can be read",
    )
