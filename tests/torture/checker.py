"""
Holds the histories of all clients, and the database at the end, to the promises.

Registers (single keys, and keys written together by batches) are checked by zones: since every value is unique, a
history is linearizable just if no value is read before its write began, no two forward zones overlap, and no forward
zone covers a backward one (Gibbons and Korach, "Testing Shared Memories", 1997). Lists only grow, so each read is a
beginning of the last one. A ticket is made once, and removed only after somebody saw it: seen again, it was made twice.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.torture.history import BROKEN, DONE, FAILED, NEVER, PENDING, UNKNOWN, Call

if TYPE_CHECKING:
    from collections.abc import Iterable

GROUP_KEYS = 3


class Finding(NamedTuple):
    """A promise that was broken: ``lost``, ``doubled`` or ``wrong``."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class Checker:
    """All calls, and the records that are there at the end."""

    def __init__(self, calls: Iterable[Call], final: dict[bytes, bytes]) -> None:
        self.calls = sorted(calls, key=lambda call: call.called)
        self.final = final
        self.findings: list[Finding] = []
        self._end = max((call.called for call in self.calls), default=0.0) + 1e9

    def check(self) -> list[Finding]:
        """Return what was broken."""
        by_kind: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            by_kind[call.kind].append(call)
            if call.outcome == BROKEN:
                self._find("wrong", f"{call.kind} {call.subject} of {call.client} ended in {call.result}")
        self._registers(by_kind)
        self._lists(by_kind)
        for kind in ("tracker", "flag", "map"):
            self._tickets(kind, by_kind)
        self._own(by_kind)
        return self.findings

    def _find(self, kind: str, text: str) -> None:
        self.findings.append(Finding(kind, text))

    # --- Registers ---

    def _registers(self, by_kind: dict[str, list[Call]]) -> None:
        writes: dict[str, list[Call]] = defaultdict(list)
        reads: dict[str, list[tuple[str | None, float, float]]] = defaultdict(list)
        for call in by_kind["put"] + by_kind["put group"]:
            writes[call.subject].append(call)
        for call in by_kind["read"]:
            if call.outcome == DONE:
                reads[call.subject].append((call.result, call.called, call.returned))
        for call in by_kind["read group"]:
            if call.outcome == DONE:
                reads[call.subject].append((self._whole(call.subject, call.result), call.called, call.returned))
        for subject, written in writes.items():
            reads[subject].append((self._last(subject), self._end, self._end))
            self._register(subject, written, reads[subject])

    def _whole(self, group: str, values: list[str]) -> str | None:
        """Return the one value of keys that were only ever written together."""
        if values and values != [values[0]] * GROUP_KEYS:
            self._find("wrong", f"a batch is seen in half: {group} holds {values}")
        return values[0] if values else None

    def _last(self, subject: str) -> str | None:
        if subject.startswith("r"):
            stored = self.final.get(f"w{subject}".encode())
            return None if stored is None else str(json.loads(stored)["id"])
        prefix = f"x{subject}.".encode()
        return self._whole(subject, [value.decode() for key, value in self.final.items() if key.startswith(prefix)])

    def _register(self, subject: str, writes: list[Call], reads: list[tuple[str | None, float, float]]) -> None:
        clusters: dict[str | None, list[tuple[float, float]]] = {None: [(-1.0, -1.0)]}
        written = {call.value: call for call in writes}
        for call in writes:
            if call.must_be_there:
                clusters[call.value] = [(call.called, call.returned)]
        for value, called, returned in reads:
            write = written.get(value) if value is not None else None
            if value is not None and (write is None or not write.may_be_there or returned < write.called):
                why = "nobody wrote" if write is None else f"was told {write.result or write.settled}"
                self._find("wrong", f"{subject} holds {value}, which {why}")
                continue
            if value not in clusters:
                assert write is not None
                clusters[value] = [(write.called, NEVER)]
            clusters[value].append((called, returned))
        self._zones(subject, clusters)

    def _zones(self, subject: str, clusters: dict[str | None, list[tuple[float, float]]]) -> None:
        forward: list[tuple[float, float, str | None]] = []
        backward: list[tuple[float, float, str | None]] = []
        for value, each in clusters.items():
            first_end, last_begin = min(end for _, end in each), max(begin for begin, _ in each)
            (forward if first_end < last_begin else backward).append((first_end, last_begin, value))
        forward.sort(key=lambda zone: zone[0])
        for (_, last_begin, value), (first_end, _, other) in pairwise(forward):
            if first_end < last_begin:
                self._find("doubled", f"{subject}: {value} is read after {other} had taken its place")
        starts = [zone[0] for zone in forward]
        for first_end, last_begin, value in backward:
            at = bisect_right(starts, last_begin) - 1
            if at >= 0 and starts[at] < last_begin and first_end < forward[at][1]:
                self._find("lost", f"{subject}: {value} was overwritten by {forward[at][2]}, an older value")

    # --- Lists ---

    def _lists(self, by_kind: dict[str, list[Call]]) -> None:
        appends: dict[str, dict[str, Call]] = defaultdict(dict)
        reads: dict[str, list[Call]] = defaultdict(list)
        for call in by_kind["append"]:
            appends[call.subject][call.value] = call
        for call in by_kind["read list"]:
            if call.outcome == DONE:
                reads[call.subject].append(call)
        for subject, calls in appends.items():
            final = json.loads(self.final.get(f"m{subject}".encode(), b"[]"))
            self._members(subject, calls, final)
            for read in reads[subject]:
                self._beginning(subject, calls, final, read)

    def _members(self, subject: str, calls: dict[str, Call], final: list[str]) -> None:
        times = Counter(final)
        for item, call in calls.items():
            found = times.pop(item, 0)
            if found > 1:
                self._find("doubled", f"{item} is {found} times in {subject}")
            if call.must_be_there and not found:
                self._find("lost", f"{item} is not in {subject}")
            if found and not call.may_be_there:
                self._find("wrong", f"{item} is in {subject}, but was told {call.result or call.settled}")
        for item in times:
            self._find("wrong", f"{item} is in {subject}, and nobody appended it")
        latest_call = 0.0
        for item in final:
            if item in calls:
                if calls[item].returned < latest_call:
                    self._find("wrong", f"{item} stands in {subject} behind one that was called after its end")
                latest_call = max(latest_call, calls[item].called)

    def _beginning(self, subject: str, calls: dict[str, Call], final: list[str], read: Call) -> None:
        found = read.result or []
        if final[: len(found)] != found:
            self._find("wrong", f"{subject} was read as {found[-3:]}, which is no beginning of it")
            return
        if any(item in calls and calls[item].called > read.returned for item in found):
            self._find("wrong", f"{subject} was read with an item that was not yet called")
        for item in final[len(found) :]:
            if item in calls and calls[item].returned < read.called:
                self._find("lost", f"{subject} was read without {item}, which was acknowledged")

    # --- Tickets ---

    def _tickets(self, kind: str, by_kind: dict[str, list[Call]]) -> None:
        looks = [
            (call.called, call.returned, self._seen(kind, call.result))
            for call in by_kind[f"{kind}s"]
            if call.outcome == DONE
        ]
        looks.append((self._end, self._end, self._seen(kind, self._left(kind))))
        makes = {call.value: call for call in by_kind["make"] if call.subject == kind}
        sightings: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for called, returned, seen in looks:
            for uid in seen:
                sightings[uid].append((called, returned))
        takes: dict[str, list[Call]] = defaultdict(list)
        for call in by_kind["take"]:
            if call.subject == kind:
                for uid in call.value or []:
                    takes[uid].append(call)
        for uid in sightings.keys() - makes.keys():
            self._find("wrong", f"{kind} {uid} is there, and nobody made it")
        for uid, make in makes.items():
            self._ticket(f"{kind} {uid}", make, sightings[uid], takes[uid])
        self._unseen(kind, makes, looks, takes)

    def _seen(self, kind: str, names: list[str]) -> set[str]:
        if kind != "flag":
            return set(names)
        times = Counter(name[:-2] for name in names)
        for uid, found in times.items():
            if found != 2:  # a pair, made and taken together
                self._find("wrong", f"a batch is seen in half: flag {uid}")
        return set(times)

    def _left(self, kind: str) -> list[str]:
        prefix = {"tracker": b"r", "flag": b"ta", "map": b"mt"}[kind]
        return [key[len(prefix) :].decode() for key in self.final if key.startswith(prefix)]

    def _ticket(self, name: str, make: Call, sightings: list[tuple[float, float]], takes: list[Call]) -> None:
        for called, returned in sightings:
            if not make.may_be_there or returned < make.called:
                self._find("wrong", f"{name} is there, but was told {make.result or make.settled or 'nothing yet'}")
                return
            if any(take.must_be_there and take.returned < called for take in takes):
                self._find("doubled", f"{name} is there again after it was removed")
                return

    def _unseen(self, kind: str, makes: dict[str, Call], looks: list[Any], takes: dict[str, list[Call]]) -> None:
        """Look for tickets that were missing while they must have been there, or that were gone and came back."""
        looks.sort(key=lambda look: look[0])
        for uid, make in makes.items():
            removal = min((take.called for take in takes[uid] if take.may_be_there), default=NEVER)
            last_seen = max((called for called, _, seen in looks if uid in seen), default=-1.0)
            known = make.returned if make.must_be_there else NEVER
            for called, returned, seen in looks:
                if uid in seen:
                    known = min(known, returned)
                elif called > known:
                    if returned < removal:
                        self._find("lost", f"{kind} {uid} is not there, and nobody had removed it")
                        break
                    if returned < last_seen:
                        self._find("doubled", f"{kind} {uid} was gone, and came back")
                        break
                    break

    # --- Lists of one thread ---

    def _own(self, by_kind: dict[str, list[Call]]) -> None:
        calls = sorted(by_kind["grow"] + by_kind["shrink"] + by_kind["read own"], key=lambda call: call.called)
        known: dict[str, list[list[str]]] = defaultdict(lambda: [[]])
        for call in calls:
            may = known[call.subject]
            if call.kind == "read own":
                if call.outcome == DONE and call.result not in may:
                    self._find(self._difference(call.result, may[0]), f"{call.subject} is {call.result}, not {may[0]}")
            elif call.outcome == DONE:
                known[call.subject] = [call.value]
            elif call.outcome in {PENDING, UNKNOWN, BROKEN}:
                known[call.subject] = [*may, call.value]
            else:
                assert call.outcome == FAILED
        for subject, may in known.items():
            found = json.loads(self.final.get(f"m{subject}".encode(), b"[]"))
            if found not in may:
                self._find(self._difference(found, may[0]), f"{subject} ends as {found}, not {may[0]}")

    @staticmethod
    def _difference(found: list[str] | None, expected: list[str]) -> str:
        return "lost" if set(expected) - set(found or []) else "doubled"
