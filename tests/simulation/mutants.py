"""
One line broken at a time, to prove that the simulation can fail: each must be found within 500 seeds.

A mutant is applied to a copy of the product in a temporary folder, which is all that the search imports. One whose
old text is no longer there exactly once fails loudly: the rule it breaks has moved, and is to be found again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import dbmd
import dbmd_client

SEEDS_MAX = 500
TREES = {
    "dbmd": Path(dbmd.__file__).parent,
    "dbmd_client": Path(dbmd_client.__file__).parent,
    "tests/simulation": Path(__file__).parent,
}


class Mutant(NamedTuple):
    """One broken line: ``old`` in ``file`` becomes ``new``."""

    name: str
    rule: str
    file: str
    old: str
    new: str


COMMIT, IDENTITIES, SESSION = "dbmd/commit.py", "dbmd/identities.py", "dbmd/session.py"
PAGING, READER, ACTOR = "dbmd/paging.py", "dbmd/actors/reader.py", "dbmd/actors/actor.py"
TRAFFIC = "dbmd_client/traffic.py"

MUTANTS = (
    Mutant(
        "answer before the sync",
        "what is persisted is persisted before anyone is told",
        COMMIT,
        "        self._bytes += size\n",
        "        self._bytes += size\n"
        "        reply = Reply(number, attempt, outcome, True, payload, self.sequence + 1)\n"
        "        return Told(ticket, client, reply)\n",
    ),
    Mutant(
        "identity in another batch",
        "an identity is recorded in the same batch as its effect",
        COMMIT,
        "        writes = [*self._written.items(), *self.identities.writes(), state]\n",
        "        writes = [*self._written.items(), *getattr(self, 'late', []), state]\n"
        "        self.late = self.identities.writes()\n",
    ),
    Mutant(
        "no barring",
        "barred is committed before the daemon says 'not applied'",
        COMMIT,
        "        if known is None:\n",
        "        if known is None:\n"
        "            return Told(ticket, ask.client, Settled(ask.tag, Outcome.FAILED, ('barred', 'not applied')))\n",
    ),
    Mutant(
        "barring not stored",
        "barred is committed before the daemon says 'not applied'",
        IDENTITIES,
        "            ends = [*known.ends.values()]\n",
        "            ends = [end for end in known.ends.values() if end.digest != BARRED]\n",
    ),
    Mutant(
        "barring leaves the floor",
        "completion records are bounded",
        COMMIT,
        "self.identities.admit(ask.client, ask.birth, floor,",
        "self.identities.admit(ask.client, ask.birth, 0,",
    ),
    Mutant(
        "floor ignored",
        "a number below the floor is never applied",
        IDENTITIES,
        "            if number < lowest:\n",
        "            if False:\n",
    ),
    Mutant(
        "floor not stored",
        "a completion record holds its client's floor",
        IDENTITIES,
        "known.touched_ms, known.floor, ends)",
        "known.touched_ms, 0, ends)",
    ),
    Mutant(
        "window not enforced by the daemon",
        "no number reaches floor + client_window",
        IDENTITIES,
        "        if number >= lowest + self._limits.client_window:\n",
        "        if False:\n",
    ),
    Mutant(
        "window not enforced by the client",
        "no number reaches floor + client_window",
        SESSION,
        "        if self._calls and number >= self.floor + self._window and not self._make_room():\n",
        "        if False:\n",
    ),
    Mutant(
        "digest not compared",
        "another command under the same number is refused",
        IDENTITIES,
        "                if digest not in (found.digest, BARRED) and found.digest != BARRED:\n",
        "                if False:\n",
    ),
    Mutant(
        "principal not compared",
        "an identity belongs to its principal",
        IDENTITIES,
        'if birth != known.birth or known.principal not in (principal, ""):',
        "if birth != known.birth:",
    ),
    Mutant(
        "principal not stored",
        "an identity belongs to its principal, over restarts too",
        IDENTITIES,
        "record = (RECORD_FORMAT, known.principal,",
        'record = (RECORD_FORMAT, "",',
    ),
    Mutant(
        "birth ignored",
        "an unknown id born before the expiry is expired, not new",
        IDENTITIES,
        "        if birth + self._expiry_ms < uptime_ms:\n",
        "        if False:\n",
    ),
    Mutant(
        "birth of a record not compared",
        "an id under another birth is another client",
        IDENTITIES,
        "if birth != known.birth or known.principal not in",
        "if known.principal not in",
    ),
    Mutant(
        "birth told anew at each hello",
        "an id keeps its birth",
        SESSION,
        "        if self.birth is None:\n",
        "        if True:\n",
    ),
    Mutant(
        "repeat not attached",
        "the newer copy's route replaces the older",
        COMMIT,
        "            if attempt >= admitted.attempt:\n",
        "            if False:\n",
    ),
    Mutant(
        "repeat evaluated again",
        "a repeat gets the original reply and changes nothing",
        COMMIT,
        "        if known is not None:\n",
        "        if known is not None and known.outcome != Outcome.DONE:\n",
    ),
    Mutant(
        "reply of the repeat recomputed",
        "a repeat gets the original reply",
        COMMIT,
        "reply = Reply(number, attempt, known.outcome, True, known.payload, known.group)",
        "reply = Reply(number, attempt, known.outcome, True, known.payload and (known.payload[0], ''), known.group)",
    ),
    Mutant(
        "pages from two snapshots",
        "a scan sees one instant",
        READER,
        "self._source.snapshot()",
        "self._source.view",
    ),
    Mutant(
        "page ends a record early",
        "a scan misses nothing",
        PAGING,
        "                return keys, found, True\n",
        "                return keys[:-1], found[:-1], True\n",
    ),
    Mutant(
        "lost page not missed",
        "a page lost in silence ends its scan as lost, and never as a hole",
        TRAFFIC,
        "        if page.number not in (pages.expected, PAGE_UNNUMBERED):\n",
        "        if False:\n",
    ),
    Mutant(
        "pages numbered alike",
        "a page lost in silence ends its scan as lost, and never as a hole",
        PAGING,
        "                opened.sent += 1\n",
        "                opened.sent += 0\n",
    ),
    Mutant(
        "read-modify-write blind to admitted commands",
        "two appends to one list in one group both count",
        COMMIT,
        "return self._written[key]",
        "return self._view.get(key)",
    ),
    Mutant(
        "unrecorded refusal final after attempt 2",
        "an unrecorded refusal is final only where one copy was sent",
        SESSION,
        "                if call.attempt > 1 and payload[0] not in _FINAL_UNRECORDED:\n",
        "                if False:\n",
    ),
    Mutant(
        "refusal of an earlier copy taken",
        "once attempt k was sent, unrecorded refusals of earlier ones are ignored",
        SESSION,
        "                if attempt < call.attempt:\n",
        "                if False:\n",
    ),
    Mutant(
        "every copy says it is the first",
        "a negative answer that is not recorded is final only where one copy was sent",
        SESSION,
        "            call.attempt += 1\n",
        "            call.attempt = 1\n",
    ),
    Mutant(
        "refusal of state not recorded",
        "a refusal that depends on the state is recorded like an effect",
        COMMIT,
        "            outcome, payload = Outcome.REFUSED, (str(error.code), error.text)\n",
        "            payload = (str(error.code), error.text)\n"
        "            reply = Reply(number, attempt, Outcome.REFUSED, True, payload, 0)\n"
        "            return Told(ticket, client, reply)\n",
    ),
    Mutant(
        "deadline checked before look-up",
        "an identity is looked up before any check of deadline",
        COMMIT,
        "        digest = digest_of(body)\n",
        "        digest = digest_of(body)\n"
        "        if deadline_ms <= clock_ms:\n"
        "            return Told(ticket, client, Reply(number, attempt, Outcome.FAILED, False, ('deadline', ''), 0))\n",
    ),
    Mutant(
        "goodbye's late copy admitted",
        "a client that said goodbye is expired, not new",
        IDENTITIES,
        "            self._departed[client] = None\n",
        "            self._departed.pop(client, None)\n",
    ),
    Mutant(
        "goodbye while outcomes may be asked for",
        "what was applied is never called 'not applied'",
        SESSION,
        "        return not self._calls and not self._told_unknown\n",
        "        return True\n",
    ),
    Mutant(
        "expiry drops a live record",
        "a record is kept for the expiry",
        IDENTITIES,
        "known.touched_ms + self._expiry_ms < uptime_ms",
        "known.touched_ms + self._expiry_ms // 8 < uptime_ms",
    ),
    Mutant(
        "uptime not persisted",
        "uptime survives every run",
        COMMIT,
        "state_record(self.sequence, self.uptime_ms)",
        "state_record(self.sequence, 0)",
    ),
    Mutant(
        "known before the commit",
        "whoever asks of a command in hand is answered with its group",
        IDENTITIES,
        "return InHand(number) if number in known.in_hand else found",
        "return found",
    ),
    Mutant(
        "hello not required",
        "a connection that said no hello to this run is refused",
        ACTOR,
        "            if known is None:\n",
        "            client = getattr(message, 'client', b'')\n"
        "            grant, mine = self.nature.grants[user_id(frame)], user_id(frame)\n"
        "            unknown = Peer(client, '', '', Origin(''), grant, mine, client)\n"
        "            self._heard_ms.setdefault(route, 0)\n"
        "            known = known or self.peers.setdefault(route, unknown)\n"
        "            if known is None:\n",
    ),
    Mutant(
        "last delete in a group lost",
        "a batch is whole or absent",
        COMMIT,
        "        writes = [*self._written.items(), *self.identities.writes(), state]\n",
        "        writes = [*self._written.items(), *self.identities.writes(), state]\n"
        "        last = next(reversed(self._written.items()), None)\n"
        "        writes = [each for each in writes if each[1] is not None or each != last]\n",
    ),
    Mutant(
        "sent, and called never sent",
        "never sent means failed, else unknown",
        SESSION,
        "        if call.attempt == 0:\n",
        "        if call.attempt <= 1:\n",
    ),
    Mutant(
        "unknown lets go of the floor",
        "the floor is the lowest number whose outcome is still wanted",
        SESSION,
        "        return self.client, birth, next(iter(self._calls)), commands\n",
        "        return self.client, birth, self._next, commands\n",
    ),
    Mutant(
        "answer to another's question",
        "every outcome told is true",
        TRAFFIC,
        "            self.asked[message.tag][1].finish(message)\n",
        "            next(iter(self.asked.values()))[1].finish(message)\n",
    ),
)  # fmt: skip


def apply(mutant: Mutant, root: Path) -> None:
    """Break one line of the copy under ``root``; raises ``ValueError`` where it is not there exactly once."""
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        message = (
            f"mutant {mutant.name!r}: its old text occurs {text.count(mutant.old)} times in {mutant.file}, not once"
        )
        raise ValueError(message)
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def copy(root: Path) -> None:
    """Copy the product and the simulation into ``root``."""
    for name, tree in TREES.items():
        shutil.copytree(tree, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests/__init__.py").touch()


def find(mutant: Mutant) -> tuple[bool, str]:
    """Search for one mutant; say whether it was found, and by what."""
    with tempfile.TemporaryDirectory(prefix="dbmd-mutant-") as folder:
        root = Path(folder)
        copy(root)
        try:
            apply(mutant, root)
        except ValueError as error:
            return False, str(error)
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "tests.simulation", "--seeds", str(SEEDS_MAX), "--jobs", "1"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines() or [""]
    found = next((line for line in lines if line.startswith("ViolationError")), "")
    seed = lines[-1].rpartition(" ")[2]
    return bool(found), f"seed {seed}: {found[:150]}" if found else lines[-1]


def hunt() -> int:
    """Search for every mutant, one on each core, and print how each was found; return the exit code."""
    missed = 0
    whole, how = find(Mutant("", "", COMMIT, '"""\n\nfrom __future__', '"""\n\nfrom __future__'))
    if whole or not how.startswith(f"{SEEDS_MAX} seeds hold"):
        sys.stdout.write(f"nothing can be learnt: the simulation fails without any mutant: {how}\n")
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, (found, how) in zip(MUTANTS, pool.map(find, MUTANTS), strict=True):
            missed += not found
            sys.stdout.write(f"{'found ' if found else 'MISSED'} {mutant.name} [{mutant.rule}]\n       {how}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(MUTANTS) - missed} of {len(MUTANTS)} mutants found within {SEEDS_MAX} seeds\n")
    return 1 if missed else 0
