"""The configuration: what is accepted, what every refusal says, and the reference file."""

from __future__ import annotations

import json
import re
import tomllib
import tracemalloc
from configparser import RawConfigParser
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
from msgpack import unpackb
from pydantic import ValidationError

from dbmd import config
from dbmd.config import ConfigError, bounds, load
from dbmd.effects import TEXT_CHARS_MAX, RefusedError
from dbmd.identities import Completion, Identities, digest_of
from dbmd.items import ITEM_BYTES
from dbmd.limits import Limits
from dbmd.protocol import Code, unpack
from dbmd.worst_case import OUTCOME_BYTES, UNFOLDED, describe

REFERENCE = Path(__file__).parent.parent / "config" / "dbmd.toml"
UNIT = REFERENCE.with_name("dbmd.service")

KEYS = [(section, key) for section, table in config.SECTIONS.items() for key in table.model_fields]
NUMBERS = [(section, key) for section, key in KEYS if bounds(section, key)]


def refusal(text: str, folder: Path) -> list[str]:
    """Load ``text`` as a file and return the lines of its refusal, without the file's name."""
    path = folder / "dbmd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(path), {})
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_no_file_and_no_flag_give_the_defaults() -> None:
    """Every key has a default, and the limits' are those of ``Limits``."""
    loaded = load(None, {})
    assert loaded.limits == Limits()
    assert (loaded.database.path, loaded.serve.endpoint, loaded.serve.managed) == ("data", "", False)
    assert (loaded.access.allow_users, loaded.access.allow_groups, loaded.access.insecure_tcp) == ([], [], False)
    assert (loaded.log.level, loaded.log.format, loaded.log.destination) == ("info", "auto", "stderr")
    assert loaded.database.write_buffer_bytes == 33_554_432


def test_the_reference_file_holds_every_key_with_its_default_in_order() -> None:
    """``config/dbmd.toml`` is the models' defaults, complete and in their order."""
    told = tomllib.loads(REFERENCE.read_text())
    assert [(section, key) for section, table in told.items() for key in table] == KEYS
    assert load(str(REFERENCE), {}) == load(None, {})


@pytest.mark.parametrize("section,key", KEYS)
def test_the_reference_file_explains_every_key(section: str, key: str) -> None:
    """Above each key stands a comment, with the bounds of a number and every choice of a word."""
    body = re.split(r"^\[(\w+)\]$", REFERENCE.read_text(), flags=re.MULTILINE)
    text = dict(zip(body[1::2], body[2::2], strict=True))[section]
    comment = re.search(rf"((?:^#.*\n)+){key} = ", text, re.MULTILINE)
    assert comment is not None
    span = bounds(section, key)
    if span:
        assert f"{span[0]} to {span[1]}." in comment[1]
        assert ("Bytes" in comment[1]) == ("bytes" in key.split("_"))
    choices = re.findall(r'"\w+"', config._allowed(section, key))
    assert all(choice in comment[1] for choice in choices)


def test_limits_are_declared_once() -> None:
    """The table of limits has the fields, defaults, bounds and reasons of the dataclass, and no other."""
    for each in fields(Limits):
        field = config.LimitsTable.model_fields[each.name]
        assert (field.default, field.description) == (each.default, each.metadata["why"])
        assert bounds("limits", each.name) == (each.metadata["lowest"], each.metadata["highest"])
    assert len(config.LimitsTable.model_fields) == len(fields(Limits))


def test_flags_override_the_file(tmp_path: Path) -> None:
    """A flag wins over the file, one that was not given (``None``) leaves it, and the rest is the file's."""
    path = tmp_path / "dbmd.toml"
    path.write_text('[database]\npath = "here"\n[log]\nlevel = "debug"\nformat = "json"\n')
    loaded = load(str(path), {"database": {"path": "there"}, "log": {"level": None}})
    assert (loaded.database.path, loaded.log.level, loaded.log.format) == ("there", "debug", "json")


def test_a_relative_path_stays_relative_to_the_working_directory(tmp_path: Path) -> None:
    """``database.path`` in a file is not joined to the file's own folder."""
    path = tmp_path / "dbmd.toml"
    path.write_text('[database]\npath = "there"\n')
    assert load(str(path), {}).database.path == "there"


@pytest.mark.parametrize("section,key", NUMBERS)
def test_numbers_are_accepted_at_their_bounds_and_refused_one_past_them(section: str, key: str) -> None:
    """Each bound itself is allowed by its table; the next number is refused with path, value and bounds."""
    span = bounds(section, key)
    assert span is not None
    table = config.SECTIONS[section]
    for number in span:
        assert getattr(table.model_validate({key: number}), key) == number
    for number in (span[0] - 1, span[1] + 1):
        with pytest.raises(ConfigError) as caught:
            load(None, {section: {key: number}})
        line = str(caught.value).splitlines()[0]
        assert line.startswith(f"command line: {section}.{key} = {number}: allowed is an integer ")
        assert f"from {span[0]} to {span[1]}" in line


@pytest.mark.parametrize("value", ["true", "1.0", '"1"', "[1]", "{a = 1}", "2024-01-01"])
def test_a_number_is_an_integer_and_nothing_that_looks_like_one(value: str, tmp_path: Path) -> None:
    """Types are strict: no float, string, boolean, date, list or table is taken for an integer."""
    (line,) = refusal(f"[limits]\nscans_max = {value}\n", tmp_path)
    assert line.startswith("limits.scans_max = ")
    assert "allowed is an integer from 1 to 4096" in line


@pytest.mark.parametrize(
    "text,expected",
    [
        ("[limits]\nkey_byte_max = 5\n", "limits.key_byte_max = 5: unknown key; did you mean limits.key_bytes_max?"),
        ("[log]\nzzz = 5\n", "log.zzz = 5: unknown key; allowed are level, format, destination"),
        ("[limit]\n", "limit: unknown section; did you mean limits?"),
        ('"a\\u001b[2Jb" = 1\n', r'"a\u001b[2Jb": unknown section; allowed are database, serve, access, limits, log'),
        ("limits = 3\n", "limits = 3: allowed is a table, [limits]"),
        ('[serve]\nmanaged = "yes"\n', 'serve.managed = "yes": allowed is true or false'),
        ("[database]\npath = 7\n", "database.path = 7: allowed is a directory's path"),
        ('[database]\npath = ""\n', 'database.path = "": allowed is a directory\'s path, neither empty nor an address'),
        (
            '[database]\npath = "tcp://h:1"\n',
            'database.path = "tcp://h:1": allowed is a directory\'s path, neither empty nor an address',
        ),
        (
            '[log]\nlevel = "INFO"\n',
            'log.level = "INFO": allowed is one of "debug", "info", "warning", "error", "critical"',
        ),
        ('[log]\nformat = "xml"\n', 'log.format = "xml": allowed is one of "auto", "json", "console"'),
        (
            '[log]\ndestination = "stdout"\n',
            'log.destination = "stdout": allowed is "stderr" or a file\'s path with a / in it',
        ),
    ],
)
def test_a_refusal_names_path_value_and_what_is_allowed(text: str, expected: str, tmp_path: Path) -> None:
    """Unknown keys suggest the nearest, everything else says what is allowed, and control characters are escaped."""
    assert refusal(text, tmp_path) == [expected]


def test_every_problem_is_told_at_once_with_its_source(tmp_path: Path) -> None:
    """Several problems are several lines, and a flag's is said to be the command line's."""
    path = tmp_path / "dbmd.toml"
    path.write_text("[limits]\nscans_max = 0\nclients_max = 0\n[log]\nlevel = 3\n")
    with pytest.raises(ConfigError) as caught:
        load(str(path), {"log": {"level": "loud"}})
    sources = [line.partition(" = ")[0] for line in str(caught.value).splitlines()]
    assert sources == [f"{path}: limits.scans_max", f"{path}: limits.clients_max", "command line: log.level"]


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    """A refusal stays readable whatever was given."""
    (line,) = refusal(f'[log]\nlevel = "{"x" * 10_000}"\n', tmp_path)
    assert len(line) < 300


@pytest.mark.parametrize("content", [b"[limits", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_a_file_that_is_not_toml_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    """Broken syntax, bytes that are not UTF-8 and a key given twice are one sentence with the file's name."""
    path = tmp_path / "dbmd.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: not TOML: ")):
        load(str(path), {})


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    """A file that cannot be read is a sentence, not a traceback of the system's error."""
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/none.toml: No such file or directory")):
        load(f"{tmp_path}/none.toml", {})


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "ipc:///run/dbmd/x",
        "ipc:///" + "a" * 98,
        "tcp://127.0.0.1:7777",
        "tcp://127.1.2.3:1",
        "tcp://[::1]:65535",
        "tcp://localhost:*",
        "tcp://127.0.0.1:0",
        "tcp://10.0.0.1:7777",
        "tcp://0.0.0.0:7777",
        "tcp://*:7777",
        "tcp://example.org:7777",
        "tcp://[2001:db8::1]:7777",
    ],
)
def test_endpoints_are_accepted(endpoint: str) -> None:
    """A socket's absolute path up to 99 bytes may be served, and any host with a port."""
    assert load(None, {"serve": {"endpoint": endpoint}}).serve.endpoint == endpoint


@pytest.mark.parametrize(
    "endpoint,allowed",
    [
        ("ipc:///" + "a" * 99, "at most 99 bytes, this has 100 .*ends at 107"),
        ("ipc:///" + "é" * 50, "at most 99 bytes, this has 101"),
        ("ipc://relative", "absolute path"),
        ("ipc://@abstract", "absolute path"),
        ("ipc://", "absolute path"),
        ("ipc:///run/\x1b[2J", "printable"),
        ("tcp://::1:7777", "in .brackets."),
        ("tcp://:7777", "a host's name"),
        ("tcp://h\u00e9:7777", "a host's name"),
        ("tcp://127.0.0.1", "HOST:PORT"),
        ("tcp://127.0.0.1:65536", "65535"),
        ("tcp://127.0.0.1:٣", "65535"),
        ("udp://127.0.0.1:7777", "ipc://PATH or tcp://HOST:PORT"),
        ("/run/dbmd/x", "ipc://PATH or tcp://HOST:PORT"),
    ],
)
def test_other_endpoints_are_refused_with_the_reason(endpoint: str, allowed: str) -> None:
    """Whatever others could reach, and what no socket could be bound to, is refused before anything starts."""
    with pytest.raises(ConfigError, match=rf"serve\.endpoint = .*: allowed is .*{allowed}"):
        load(None, {"serve": {"endpoint": endpoint}})


@pytest.mark.parametrize(
    "endpoint, good",
    [
        ("tcp://127.0.0.1:7777", True),
        ("tcp://127.1.2.3:1", True),
        ("tcp://[::1]:65535", True),
        ("tcp://localhost:*", True),
        ("ipc:///run/dbmd/x", True),
        ("", True),
        ("tcp://10.0.0.1:7777", False),
        ("tcp://0.0.0.0:7777", False),
        ("tcp://*:7777", False),
        ("tcp://example.org:7777", False),
        ("tcp://[127.0.0.1]:7777", False),
        ("tcp://[::ffff:10.0.0.1]:7777", False),
        ("tcp://[::1%lo]:7777", False),
        ("tcp://[::]:7777", False),
    ],
)
def test_insecure_tcp_is_for_the_loopback_only(endpoint: str, good: bool) -> None:  # noqa: FBT001
    """Where no keys are asked, what another host could reach is refused before anything starts."""
    flags: dict[str, dict[str, object]] = {"serve": {"endpoint": endpoint}, "access": {"insecure_tcp": True}}
    if good:
        assert load(None, flags).serve.endpoint == endpoint
    else:
        with pytest.raises(ConfigError, match=r"serve\.endpoint = .*: allowed is a loopback host"):
            load(None, flags)


ROLE = '[access.roles.watcher]\nreads = ["entries"]\nwrites = ["trackers"]\n'


def test_roles_are_limited_to_kinds_of_record(tmp_path: Path) -> None:
    """A table of its own makes a role beside the three there are, and a user may be given any of them."""
    path = tmp_path / "dbmd.toml"
    path.write_text(f'[access]\nallow_users = ["alice", "7:watcher", "bob:reader"]\n{ROLE}')
    loaded = load(str(path), {})
    roles = loaded.access.all_roles()
    assert list(roles) == ["reader", "writer", "operator", "watcher"]
    assert roles["watcher"].free == {"read"}
    assert "watcher = {reads" in describe(loaded)
    path.with_name("again").write_text(describe(loaded))
    assert load(str(path.with_name("again")), {}) == loaded


@pytest.mark.parametrize(
    "text, expected",
    [
        ('allow_users = ["a:none"]', 'access.allow_users = "a:none": allowed are the roles reader, writer, operator'),
        ('allow_users = ["a b"]', 'which "a b" is not'),
        ('allow_groups = ["a\\u001b"]', r'which "a\u001b" is not'),
        ("allow_groups = [1]", 'allowed is a list of names or numbers, each with ":ROLE" behind it or not'),
        ("[access.roles.reader]", 'which "reader" is not'),
        ('[access.roles."a b"]', 'which "a b" is not'),
        ('[access.roles.w]\nwrites = ["tracker"]', 'which "tracker" is not'),
        ("[access.roles.w]\nmore = 1", "allowed is tables [access.roles.NAME]"),
        ("insecure_tcp = 1", "access.insecure_tcp = 1: allowed is true or false"),
        ('keys = "a\\u0000"', r'access.keys = "a\u0000": allowed is a directory'),
    ],
)
def test_who_may_enter_is_checked_at_the_start(text: str, expected: str, tmp_path: Path) -> None:
    """A slip in a name, a role or a kind of record lets nobody in by mistake: it stops the start."""
    (line,) = refusal(f"[access]\n{text}\n", tmp_path)
    assert expected in line


@pytest.mark.parametrize(
    "limits",
    [
        {"message_bytes_max": 4_194_304 + 1024 + 4095},
        {"group_bytes_max": 4_194_304 + 1023},
        {"clients_remembered_max": 1023},
        {"snapshot_age_s_max": 59},
    ],
)
def test_limits_that_contradict_each_other_are_refused_and_one_less_is_fine(limits: dict[str, int]) -> None:
    """A law between limits names every key in it with its value; at the law's edge the daemon starts."""
    ((key, number),) = limits.items()
    with pytest.raises(ConfigError, match=rf"limits\.{key} = {number}: allowed is .* up to {key} "):
        load(None, {"limits": limits})
    assert getattr(load(None, {"limits": {key: number + 1}}).limits, key) == number + 1


def test_a_loaded_configuration_cannot_change() -> None:
    """The parts of a configuration are frozen."""
    loaded = load(None, {})
    with pytest.raises(ValidationError):
        loaded.log.level = "debug"
    with pytest.raises(FrozenInstanceError):
        loaded.limits = Limits()  # type: ignore[misc]


def test_describe_prints_every_key_and_marks_what_changed(tmp_path: Path) -> None:
    """The description is a configuration file that loads to the same configuration."""
    loaded = load(None, {"limits": {"scans_max": 7}, "database": {"path": 'q"\x7f\n'}})
    text = describe(loaded)
    told = tomllib.loads(text)
    assert [(section, key) for section, table in told.items() for key in table] == KEYS
    assert "scans_max = 7  # changed from 256\n" in text
    assert 'endpoint = ""\n' in text
    assert text.count("changed from") == 2
    assert text.isascii()
    path = tmp_path / "again.toml"
    path.write_text(text)
    assert load(str(path), {}) == loaded


def test_describe_shows_the_arithmetic_of_the_worst_case() -> None:
    """Each product stands with its factors, and they multiply to what it says."""
    text = describe(load(None, {}))
    assert "scans_max 256 x page_credit_max 4 x page_bytes_max 524288 = 512 MiB" in text
    assert "clients_remembered_max 10000 x client_window 256 x bytes 600 = 1.431 GiB" in text
    assert "at the reader of points: clients_max 1024 x 2 x message_bytes_max 16777216 = 32 GiB" in text
    assert "log_buffer_bytes_max 8388608 = 8 MiB" in text
    assert "sockets 3 x items 401000 x bytes 80 = 91.78 MiB" in text
    assert "sockets 3 x bytes 1048576 x unfolded 33 = 99 MiB" in text
    assert "batch_keys_max 100000 x us 4 = 0.4 s" in text
    assert text.count("together: ") == 2


def test_an_outcome_took_more_than_the_arithmetic_said() -> None:
    """What is remembered of the longest refusals is what the arithmetic says, or somewhat less."""
    identities, clients, window = Identities(Limits(), ()), 20, range(1, 257)
    tracemalloc.start()
    try:
        for client in range(clients):
            for number in window:
                text = RefusedError(Code.PRECONDITION, "y" * 2 * TEXT_CHARS_MAX).text
                end = Completion(number, 1, (str(Code.PRECONDITION), text), digest_of(text.encode()), 1 << 40)
                identities.admit(client.to_bytes(16, "big"), 0, 1, end, 0, "uid:1")
        identities.committed()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert OUTCOME_BYTES * 0.9 < held / (clients * len(window)) <= OUTCOME_BYTES


def test_a_request_unfolds_to_no_more_than_the_arithmetic_says() -> None:
    """The least that a frame can spend on an item is an array of one small number: what that takes is the factor."""
    items = 400_000  # so many that what other threads take meanwhile counts for nothing
    frame = b"\xdd" + items.to_bytes(4, "big") + b"\x91\x01" * items
    tracemalloc.start()
    try:
        unpack(frame)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert UNFOLDED / 2 < most / len(frame) < UNFOLDED


@pytest.mark.parametrize(
    "item, holds",
    [
        (b"\x91\x01", 2),
        (b"\xa2ab", 1),
        (b"\xcd\x7f\xff", 1),
        (b"\x81\xa1a\x01", 3),
        (b"\x80", 1),
        (b"\xcb1234567\x01", 1),
    ],
    ids=["array", "text", "number", "map", "empty map", "float"],
)
def test_an_item_takes_no_more_than_the_arithmetic_says(item: bytes, holds: int) -> None:
    """Whatever items a counted request is of, they take up to so much memory each."""
    count = 100_000
    frame = b"\xdd" + count.to_bytes(4, "big") + item * count
    tracemalloc.start()
    try:
        unpackb(frame, use_list=False)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < ITEM_BYTES * holds * count + len(frame)


def test_the_unit_runs_the_daemon_as_the_reference_says() -> None:
    """The systemd unit waits until ready, is restarted unless stopped, keeps the runtime directory, hides the data."""
    unit = RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["ExecStart"] == "/usr/bin/env dbmd serve --config /etc/dbmd/dbmd.toml --managed"
    assert (service["Type"], service["Restart"], service["UMask"]) == ("notify", "on-failure", "0077")
    assert (service["RuntimeDirectory"], service["RuntimeDirectoryMode"]) == ("dbmd", "0755")
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert (service["StateDirectory"], service["ProtectSystem"]) == ("dbmd", "strict")
    assert int(service["WatchdogSec"]) > 0
    assert int(service["LimitNOFILE"]) > config.PUBLIC_SOCKETS * Limits().clients_max


def test_error_text_is_one_line_per_problem_even_for_line_breaks() -> None:
    """A line break in a value does not make a line of its own."""
    with pytest.raises(ConfigError) as caught:
        load(None, {"log": {"level": "a\nb"}})
    assert str(caught.value).count("\n") == 0
    assert json.dumps("a\nb") in str(caught.value)
