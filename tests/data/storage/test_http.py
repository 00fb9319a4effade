"""Shards from a failing web server: transient failures do not change the data, permanent ones are reported at once."""

import hashlib
import logging
import pickle
import socket
import threading
import time

import pytest

from dcscale.data import DataError
from dcscale.data.storage import ContentError, RetryPolicy, StorageOptions, UnreadableError, open_storage
from dcscale.testing import shard_server as faults
from dcscale.testing.shard_server import ShardServer

CONTENT = bytes(range(256)) * 1000
SIZE = len(CONTENT)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = StorageOptions(RetryPolicy(timeout=0.3, backoff=0.001, total=3))
FILE = "train/s.tar"


@pytest.fixture
def server(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / FILE).write_bytes(CONTENT)
    with ShardServer(tmp_path) as server:
        yield server


def read(server, *, size=SIZE, sha256=SHA256, storage_options=QUICK, query=""):
    return open_storage(f"{server.address}/train{query}", storage_options).read("s.tar", size, sha256)


def ranges(server):
    return [request.range for request in server.requests]


TRANSIENT = {
    "503": [faults.status(503)],
    "503 many times": [faults.status(503)] * 6,
    "429 with a time to wait": [faults.status(429, Retry_After="0")],
    "500, 502, 504": [faults.status(500), faults.status(502), faults.status(504)],
    "408, 425": [faults.status(408), faults.status(425)],
    "stall before the answer": [faults.stall()],
    "stall in the body": [faults.stall(5000)],
    "cut body": [faults.cut(5000)],
    "cut body without a length": [faults.cut(5000, length=False)],
    "cut at the first byte": [faults.cut(0)],
    "reset before the answer": [faults.reset()],
    "reset in the body": [faults.reset(5000)],
    "a flipped bit": [faults.corrupt],
    "two flipped bits": [faults.corrupt, faults.corrupt],
    "a web page": [faults.page],
    "a web page, twice": [faults.page, faults.page],
    "a range ignored": [faults.cut(5000), faults.ignore_range],
    "a range ignored, and cut": [faults.cut(5000), faults.ignore_range_and_cut(7000)],
    "another range": [faults.cut(5000), faults.wrong_range],
    "everything": [
        faults.cut(5000),
        faults.status(503),
        faults.reset(100),
        faults.page,
        faults.cut(9000, length=False),
        faults.corrupt,
        faults.stall(3),
    ],
}


@pytest.mark.parametrize("list_of_faults", TRANSIENT.values(), ids=TRANSIENT)
def test_transient_failures_do_not_change_the_content(server, list_of_faults):
    server.faults[FILE] = list(list_of_faults)
    assert read(server) == CONTENT
    assert server.faults[FILE] == []
    assert type(read(server)) is bytes


def test_a_cut_body_is_continued_where_it_ended(server):
    server.faults[FILE] = [faults.cut(5000), faults.cut(700), faults.cut(11, length=False)]
    assert read(server) == CONTENT
    assert ranges(server) == [None, "bytes=5000-", "bytes=5700-", "bytes=5711-"]
    assert {request.headers["Accept-Encoding"] for request in server.requests} == {"identity"}


def test_an_object_replaced_between_two_attempts_is_read_from_the_beginning(server):
    """The beginning of the old object and the end of the new one must never be combined."""
    new = CONTENT[::-1]

    def replace(handler, content):
        (server.folder / FILE).write_bytes(new)
        faults.cut(5000)(handler, content)

    server.faults[FILE] = [replace]
    assert read(server, sha256=None) == new
    assert ranges(server) == [None, "bytes=5000-"]


def test_an_object_of_unknown_size_is_read(server):
    server.faults[FILE] = [faults.status(503), faults.cut(5000)]
    assert read(server, size=None, sha256=None) == CONTENT


FINAL = {
    "404": (faults.status(404), r"the server answers 404 Not Found$"),
    "410": (faults.status(410), r"the server answers 410 Gone$"),
    "401": (faults.status(401), r"the server answers 401 Unauthorized; give it credentials, as in ~/\.netrc"),
    "403": (faults.status(403), r"the server answers 403 Forbidden; give it credentials"),
    "400": (faults.status(400), r"the server answers 400 Bad Request$"),
    "packed": (faults.content_encoding, r"sends it with Content-Encoding gzip; turn that off"),
    "to a file": (faults.redirect("file:///etc/passwd"), r"redirects to an address that is neither http nor https"),
    "to ftp": (faults.redirect("ftp://127.0.0.1/x"), r"redirects to an address that is neither http nor https"),
    "to a command": (
        faults.redirect("pipe:cat /etc/passwd"),
        r"redirects to an address that is neither http nor https",
    ),
    "in a circle": (faults.redirect("/" + FILE), r"redirects too many times"),
}


@pytest.mark.parametrize(("fault", "message"), FINAL.values(), ids=FINAL)
def test_permanent_failures_are_reported_at_once_with_address_and_reason(server, fault, message):
    server.always[FILE] = fault
    with pytest.raises(UnreadableError, match=message) as error:
        read(server)
    assert str(error.value).startswith(f"{server.address}/{FILE}: cannot be read: ")
    assert error.value.missing == (fault in (FINAL["404"][0], FINAL["410"][0]))
    assert len(server.requests) <= 31 if "circle" in str(error.value) else 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (faults.page, rf"it has {len(faults.PAGE)} bytes, but the manifest says {len(CONTENT)}: it was cut off or"),
        (faults.corrupt, rf"its SHA-256 is [0-9a-f]{{64}}, but the manifest says {SHA256}"),
        (faults.other_content(CONTENT + b"x"), "it has 256001 bytes, but the manifest says 256000"),
        (faults.other_content(CONTENT + b"x" * 99999, length=False), r"it has \d+ bytes, but the manifest says 256000"),
        (faults.other_content(CONTENT[:-1]), "it has 255999 bytes, but the manifest says 256000"),
    ],
)
def test_wrong_content_is_tried_three_times(server, fault, message):
    server.always[FILE] = fault
    with pytest.raises(ContentError, match=message) as error:
        read(server)
    assert str(error.value).startswith(f"{server.address}/{FILE}: ")
    assert ranges(server) == [None] * 3


def test_a_body_without_a_length_that_always_ends_early_is_the_object(server):
    server.always[FILE] = faults.other_content(CONTENT[:-1], length=False)
    with pytest.raises(ContentError, match="it has (255999|less than the 256000) bytes"):
        read(server)
    assert len(server.requests) < 8


def test_an_empty_object(server):
    server.always[FILE] = faults.other_content(b"")
    with pytest.raises(ContentError, match="it has 0 bytes, but the manifest says 256000"):
        read(server)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (faults.status(503), "the server answers 503 Service Unavailable"),
        (faults.stall(), r"no data arrived for 0\.1 s"),
        (faults.stall(99), r"no data arrived for 0\.1 s"),
        (faults.reset(), "Connection reset by peer"),
        (faults.drip(0.02), r"after \d+ bytes the time was up"),
    ],
)
def test_the_time_of_all_attempts_is_limited(server, fault, reason):
    server.always[FILE] = fault
    start = time.monotonic()
    with pytest.raises(UnreadableError, match=rf"({reason}); stopped after \d+ attempts in \d+ s") as error:
        read(server, storage_options=StorageOptions(RetryPolicy(timeout=0.1, backoff=0.01, total=0.5)))
    assert time.monotonic() - start < 5
    assert error.value.retry
    assert not error.value.missing


def test_a_server_that_does_not_exist():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        storage = open_storage(
            f"http://127.0.0.1:{port}/train", StorageOptions(RetryPolicy(timeout=0.1, backoff=0.01, total=0.05))
        )
        with pytest.raises(UnreadableError, match=r"Connection refused; stopped after \d+ attempts"):
            storage.read("s.tar")


def test_repeated_failures_are_logged_once_with_the_address(server, caplog):
    server.faults[FILE] = [faults.status(503)] * 6
    with caplog.at_level(logging.WARNING, "dcscale.data"):
        read(server)
    (record,) = caplog.records
    assert record.message.startswith(
        f"{server.address}/{FILE}: the server answers 503 Service Unavailable; retrying for"
    )


class Waits(list):
    """Replaces an event; records the waits instead of waiting."""

    def wait(self, seconds):
        self.append(seconds)
        return False


def test_retry_after_is_respected_up_to_a_limit(server):
    storage = open_storage(f"{server.address}/train", StorageOptions(RetryPolicy(timeout=5, backoff=0.001, total=600)))
    storage._retrier._cancelled = waits = Waits()
    server.faults[FILE] = [faults.status(503, Retry_After="7"), faults.status(429, Retry_After="86400")]
    assert storage.read("s.tar") == CONTENT
    assert waits == [7.0, 60.0]


def test_waits_grow_and_are_drawn_at_random(server):
    storage = open_storage(f"{server.address}/train", StorageOptions(RetryPolicy(timeout=5, backoff=1, total=10**6)))
    storage._retrier._cancelled = waits = Waits()
    server.faults[FILE] = [faults.status(503)] * 40
    assert storage.read("s.tar") == CONTENT
    assert all(wait <= min(60, 2**i) for i, wait in enumerate(waits))
    assert len(set(waits)) == 40
    assert max(waits) > 30


def test_closing_cancels_reads_in_progress_but_not_later_ones(server):
    storage = open_storage(f"{server.address}/train", StorageOptions(RetryPolicy(timeout=5, backoff=100, total=600)))
    server.faults[FILE] = [faults.status(503, Retry_After="50")]
    errors = []

    def read():
        try:
            storage.read("s.tar")
        except UnreadableError as error:
            errors.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    stop = time.monotonic() + 10
    while not server.requests and time.monotonic() < stop:
        time.sleep(0.001)
    time.sleep(0.05)
    storage.close()
    thread.join(10)
    assert [error.endswith("503 Service Unavailable; cancelled after 1 attempts") for error in errors] == [True]
    assert storage.read("s.tar") == CONTENT


def test_a_failing_server_is_not_waited_for_again_for_every_object(server):
    for name in "abcdef":
        (server.folder / f"train/{name}.tar").write_bytes(b"x")
        server.always[f"train/{name}.tar"] = faults.status(503)
    storage = open_storage(f"{server.address}/train", StorageOptions(RetryPolicy(timeout=0.1, backoff=0.01, total=0.3)))
    start = time.monotonic()
    for name in "abcdef":
        with pytest.raises(UnreadableError):
            storage.read(f"{name}.tar")
    assert time.monotonic() - start < 1.2, "0.3 s for the first object, and almost nothing for the others"
    assert storage.read("s.tar") == CONTENT
    server.faults[FILE] = [faults.status(503)] * 3
    assert storage.read("s.tar") == CONTENT, "after an answer, the server is retried as usual"


def test_redirects_within_http_are_followed_and_the_content_checked(server):
    (server.folder / "moved.tar").write_bytes(CONTENT)
    server.always[FILE] = faults.redirect("/moved.tar")
    assert read(server) == CONTENT
    (server.folder / "moved.tar").write_bytes(CONTENT[::-1])
    with pytest.raises(ContentError):
        read(server)


def test_a_redirect_from_https_to_http_is_refused(server, monkeypatch):
    storage = open_storage("https://127.0.0.1/train", QUICK)
    monkeypatch.setattr(storage, "_url", lambda name: f"{server.address}/train/{name}")
    with pytest.raises(UnreadableError, match="redirects from https to http"):
        storage.read("s.tar")


def test_secrets_are_sent_but_never_shown(server):
    address = server.address.replace("://", "://user:secret@")
    storage = open_storage(f"{address}/train?token=hidden", QUICK)
    assert storage.read("s.tar", SIZE, SHA256) == CONTENT
    assert server.requests[0].headers["Authorization"].startswith("Basic ")
    server.always[FILE] = faults.status(403)
    shown = [str(storage), storage.location("s.tar")]
    for fault in (faults.status(403), faults.page, faults.redirect("file:///x?token=hidden"), faults.redirect("/x")):
        server.always[FILE] = fault
        with pytest.raises(DataError) as error:
            storage.read("s.tar", SIZE, SHA256)
        shown.append(str(error.value))
    silent = open_storage("http://user:secret@127.0.0.1:1/?token=hidden", StorageOptions(RetryPolicy(0.1, 0.001, 0.01)))
    with pytest.raises(UnreadableError) as error:
        silent.read("s.tar")
    shown.append(str(error.value))
    assert not [text for text in shown if "secret" in text or "hidden" in text]
    assert storage.location("s.tar") == f"{server.address}/{FILE}?..."


def test_the_query_is_sent_with_every_request(server):
    requested = []
    server.always[FILE] = lambda handler, content: (requested.append(handler.path), handler.serve(content))
    assert read(server, query="?sv=1&sig=a%2Fb") == CONTENT
    assert requested == [f"/{FILE}?sv=1&sig=a%2Fb"]


def test_check_does_not_read(server):
    storage = open_storage(f"{server.address}/train", QUICK)
    storage.check({"s.tar": len(CONTENT)})
    server.faults[FILE] = [faults.status(503)]
    storage.check({"s.tar": len(CONTENT)})
    assert server.paths("GET") == []
    with pytest.raises(ContentError, match=r"s\.tar: it has 256000 bytes, but the manifest says 5"):
        storage.check({"s.tar": 5})
    with pytest.raises(UnreadableError, match=r"t\.tar: cannot be read: the server answers 404"):
        storage.check({"t.tar": 5})
    server.always[FILE] = faults.status(405)
    storage.check({"s.tar": 5})


def test_check_of_many_objects_takes_a_sample(server):
    for i in range(200):
        (server.folder / f"train/{i}.tar").write_bytes(b"x")
    open_storage(f"{server.address}/train", QUICK).check({f"{i}.tar": 1 for i in range(200)})
    assert 30 < len(set(server.paths("HEAD"))) <= 64


def test_another_process_makes_its_own_connections(server):
    storage = open_storage(f"{server.address}/train", QUICK)
    assert storage.read("s.tar") == CONTENT
    assert pickle.loads(pickle.dumps(storage)).read("s.tar") == CONTENT


@pytest.mark.parametrize("root", ["pipe:cat x", "file:///data", "ftp://host/x", "hf://x/y", "gopher:x"])
def test_unsupported_schemes_are_refused(root):
    with pytest.raises(DataError, match=r"shards cannot be read from [a-z]+:; give a folder, or"):
        open_storage(root)


@pytest.mark.parametrize("root", ["http:///x", "http://h:99999/x", "http://h:0/x", "http://h:port/x", "http://[::1/x"])
def test_an_address_without_a_host_or_port(root):
    with pytest.raises(
        DataError, match=r"has no host, or a port that is not from 1 to 65535; write it as http://HOST/FOLDER"
    ):
        open_storage(root)


def test_an_ipv6_host_is_not_a_pattern():
    storage = open_storage("http://[::1]:8080/part-{0,1}/train", QUICK)
    assert [part.location("s.tar") for part in storage.parts] == [
        f"http://[::1]:8080/part-{i}/train/s.tar" for i in (0, 1)
    ]
    with pytest.raises(DataError, match=r"\* and \[ cannot be used here"):
        open_storage("http://[::1]:8080/part-*/train", QUICK)
