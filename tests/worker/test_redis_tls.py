"""Server and worker over TLS, with a password. The embedded Valkey has no TLS: a terminator stands before it."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trustme

from tests.stack import Stack, eventually

PASSWORD = "hush"


@contextmanager
def terminator(port: int, authority: trustme.CA) -> Iterator[int]:
    """A port that speaks TLS and passes what it hears on to a port here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=relay, args=(connection,), daemon=True).start()

        def relay(connection: socket.socket) -> None:
            with (
                suppress(OSError),
                context.wrap_socket(connection, server_side=True) as outer,
                socket.create_connection(("127.0.0.1", port)) as inner,
            ):
                while True:
                    ready = [outer] if outer.pending() else select.select([outer, inner], [], [])[0]
                    for source, target in ((outer, inner), (inner, outer)):
                        if source in ready:
                            data = source.recv(65536)
                            if not data:
                                return
                            target.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def test_jobs_run_over_tls_with_a_password_and_not_past_a_certificate_nobody_vouches_for(
    tmp_path: Path, served_models: Path
) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    stack = Stack(tmp_path / "stack", served_models, password=PASSWORD)
    try:
        stack.valkey("--requirepass", PASSWORD)
        with terminator(stack.redis_port, authority) as port:
            url = f"rediss://:{PASSWORD}@localhost:{port}/0?ssl_ca_certs={tmp_path}"
            stack.environment["GUIDED_REDIS_URL"] = f"{url}/stranger.pem"
            refused = stack.api()
            assert stack.http.get("/readyz").json()["redis"] is False
            answer = stack.http.post("/generate", json={"model": "tiny", "steps": 2})
            assert answer.status_code == 503
            assert "certificate verify failed" in refused.log.read_text()
            refused.kill()
            stack.environment["GUIDED_REDIS_URL"] = f"{url}/ca.pem"
            stack.api()
            stack.worker()
            job = stack.generate(expect=200, headers={"Prefer": "wait=60"}, class_label=1, steps=2)
            assert job["status"] == "finished"
            assert eventually(lambda: stack.http.get("/readyz").status_code == 200)
    finally:
        stack.close()
