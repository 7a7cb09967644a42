"""
dbmd owns one LevelDB and lets many processes share it over ZeroMQ: acknowledged means kept.

Pure rooms, which read no clock and do no I/O:

- ``limits``: every limit both sides share; ``storage``: what is asked of a store, and a memory store.
- ``values``: JSON, exactly; ``keyspaces``: where keys belong.
- ``protocol``: the wire; ``items``: what a frame holds, counted first; ``shapes``: untrusted values as declared, and
  ``frequent``: the same, in line.
- ``access``: who may enter, as whom, and what a role may touch.
- ``effects``: what is done to a store; ``verbs``: the kinds of operation, caller's and store's half.
- ``operations``: THE registry, one declaration per operation; ``manners``: how each behaves at its caller.
- ``turns``: fairness between processes.
- ``reserved``: what of dbmd's own this version may serve.
- ``identities``: known, admitted, barred, expired; ``session``: the client's half of that.
- ``commit``: group commit as a state machine; ``paging``: a snapshot cut into pages under credit.

Rooms with windows:

- ``engines``: LevelDB, and the reading of its files before it is opened.
- ``actors``: writer, readers (points, scans) and gate, which lets peers in: a thread, a ROUTER and a loop each.
- ``doors``: the public sockets; ``keys``: CURVE keys as files.
- ``config`` with ``addresses`` and ``worst_case``; ``log`` and its ``sink``.
- ``places``, ``flocks``, ``rendezvous``: how client and daemon find each other.
- ``standing``: what an operator is told, and his stop; ``asking``: the commands that ask.
- ``daemon``: the composition root; ``cli`` and ``__main__``: arguments, no logic.

A command walks: operation, verb encodes, session, DEALER | writer drains its ROUTER, admits, one batch
and one sync per group, replies, log lines | returns. A query walks: the same to a reader, which answers
from the store as it is, or opens a snapshot and sends pages under credit until its end.
"""

__version__ = "0.1.0"
