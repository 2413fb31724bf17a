"""Where webhooks go and where not, by real connections to real receivers."""

from __future__ import annotations

import json
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme
from standardwebhooks import Webhook

from worker import webhooks
from worker.jobs import Priority, SampleJob, StagePlan
from worker.records import JobError, Outcome
from worker.settings import CommonSettings
from worker.webhooks import is_public, refusal, send_webhook

SECRET = "whsec_" + "MDEyMzQ1Njc4OWFiY2RlZmdoaWprbG1u"
DONE = Outcome(status="failed", at=1.0, error=JobError(kind="deadline", message="too late"))


class Receiver:
    """What came, and how to answer."""

    def __init__(self, status: int = 204, **headers: str) -> None:
        self.status, self.headers = status, headers
        self.heard: list[tuple[dict[str, str], bytes]] = []
        self.url = ""

    @contextmanager
    def listening(self, host: str = "127.0.0.1", context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.heard.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(receiver.status)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            if context:
                server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            self.url = f"http{'s' if context else ''}://{host}:{server.server_port}/hook?a=b"
            yield self
            server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One attempt, and little patience; the test of several attempts says so."""
    monkeypatch.setattr(webhooks, "ATTEMPTS", 1)
    monkeypatch.setattr(webhooks, "PATIENCE_S", 2.0)


def settings(**changes: Any) -> CommonSettings:
    given = {"webhook_hosts": ("127.0.0.1", "localhost"), "webhook_private": True, **changes}
    return CommonSettings(**given)


def job(url: str) -> SampleJob:
    stage = StagePlan(
        model="tiny",
        version=None,
        respacing="2",
        steps=2,
        sampler="ddpm",
        eta=0.0,
        guidance_scale=0.0,
        guidance_interval=None,
        clip_denoised=True,
        labelled=False,
    )
    return SampleJob(
        id="0" * 32,
        created=0.0,
        stages=(stage,),
        seed=0,
        labels=(None,),
        priority=Priority.default,
        deadline=None,
        format="png",
        preview_every=None,
        webhook_url=url,
        part_images=1,
    )


def example() -> Callable[[dict[str, str], bytes, str], Any]:
    """The receiver's check as the documentation shows it."""
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    block = re.search(r"```python\n(import base64.*?)```", text, re.DOTALL)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block[1], names)
    found: Callable[[dict[str, str], bytes, str], Any] = names["verify"]
    return found


def test_it_is_signed_so_that_any_receiver_of_the_standard_can_check_it() -> None:
    with Receiver().listening() as receiver:
        send_webhook(job(receiver.url), DONE, settings(webhook_secret=SECRET))
    ((headers, body),) = receiver.heard
    told = {"id": "0" * 32, "status": "failed", "error": {"kind": "deadline", "message": "too late"}}
    assert Webhook(SECRET).verify(body, headers) == told
    assert headers["webhook-id"] == f"msg_{'0' * 32}"
    assert example()(headers, body, SECRET) == told


@pytest.mark.parametrize("change", ["body", "secret", "time", "id"])
def test_the_documented_check_refuses_what_was_changed(change: str) -> None:
    with Receiver().listening() as receiver:
        send_webhook(job(receiver.url), DONE, settings(webhook_secret=SECRET))
    ((headers, body),) = receiver.heard
    secret = SECRET
    if change == "body":
        body = body.replace(b"failed", b"finished")
    elif change == "secret":
        secret = SECRET[:-4] + "AAAA"
    elif change == "time":
        headers["webhook-timestamp"] = str(int(time.time()) - 3600)
    else:
        headers["webhook-id"] = "msg_other"
    with pytest.raises(ValueError, match="webhook"):
        example()(headers, body, secret)


def test_without_a_secret_it_is_not_signed() -> None:
    with Receiver().listening() as receiver:
        send_webhook(job(receiver.url), DONE, settings())
    assert "webhook-signature" not in receiver.heard[0][0]


def test_no_redirect_is_followed() -> None:
    with Receiver().listening() as inside, Receiver(302, Location=inside.url).listening() as receiver:
        send_webhook(job(receiver.url), DONE, settings())
    assert len(receiver.heard) == 1
    assert inside.heard == []


def test_it_is_tried_again_under_the_same_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "ATTEMPTS", 2)
    with Receiver(500).listening() as receiver:
        send_webhook(job(receiver.url), DONE, settings(webhook_secret=SECRET))
    assert len(receiver.heard) == 2
    assert len({headers["webhook-id"] for headers, _ in receiver.heard}) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_allowed_host_at_a_private_address_gets_nothing(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with Receiver().listening(host) as receiver:
        send_webhook(job(receiver.url), DONE, settings(webhook_private=False))
    assert receiver.heard == []
    assert "webhook_private is off" in caplog.text


def test_the_name_is_resolved_once_and_the_checked_address_is_what_is_connected_to() -> None:
    asked: list[object] = []
    connected: list[object] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            asked.append(arguments[0])
        elif event == "socket.connect":
            connected.append(arguments[1][0])

    sys.addaudithook(watch)  # stays; it does nothing after this test but fill two lists
    with Receiver().listening("localhost") as receiver:
        send_webhook(job(receiver.url), DONE, settings())
        assert len(receiver.heard) == 1
        assert receiver.heard[0][0]["host"].startswith("localhost:")
    assert asked.count("localhost") == 1
    assert "127.0.0.1" in connected
    assert "localhost" not in connected


def test_tls_is_checked_against_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    webhooks._tls.cache_clear()
    told = []
    for name in ("localhost", "other.example"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(context)
        with Receiver().listening("localhost", context) as receiver:
            send_webhook(job(receiver.url), DONE, settings())
        told.append(len(receiver.heard))
    webhooks._tls.cache_clear()
    assert told == [1, 0]


def test_a_receiver_that_drips_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                try:
                    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000:
                        connection.sendall(bytes([byte]))
                        time.sleep(0.1)
                except OSError:
                    pass

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        send_webhook(job(f"http://127.0.0.1:{server.getsockname()[1]}/"), DONE, settings())
    assert 0.4 < time.monotonic() - began < 1.5


def test_an_endless_answer_is_not_read() -> None:
    class Endless(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        began = time.monotonic()
        send_webhook(job(f"http://127.0.0.1:{server.server_port}/"), DONE, settings())
        assert time.monotonic() - began < 1.0
        server.shutdown()


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/",
        "http://hooks.example@evil.example/",
        "http://evil.example#@hooks.example/",
        "http://evil.example\\@hooks.example/",
        "http://hooks.example.evil.example/",
        "http://hooks.example:80@evil.example/",
        "http://user:word@hooks.example/",
        "http://127.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http:///x",
        "http://hooks.example\n.evil.example/",
    ],
)
def test_urls_that_are_refused_at_once(url: str) -> None:
    assert refusal(url, settings(webhook_hosts=("hooks.example",), webhook_private=False)) is not None


def test_urls_that_are_not() -> None:
    allowed = settings(webhook_hosts=("hooks.example", "93.184.216.34"), webhook_private=False)
    assert refusal("https://hooks.example:8443/a?b=c", allowed) is None
    assert refusal("https://93.184.216.34/", allowed) is None


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("239.1.1.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) == public


def test_the_body_is_json() -> None:
    with Receiver().listening() as receiver:
        send_webhook(job(receiver.url), Outcome(status="finished", at=1.0), settings())
    headers, body = receiver.heard[0]
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"id": "0" * 32, "status": "finished", "error": None}
