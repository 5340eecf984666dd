"""Clients of ``ssmzoo serve`` that mean no good: other hosts' names, places held for nothing, bodies that cost much."""

from __future__ import annotations

import http.client
import json
import socket
import time

import pytest

pytest.importorskip("fastapi", reason="needs fastapi")

from served import NAME, served, small_model

from ssmzoo.serve import Limits
from ssmzoo.serve.bodies import Chat, Completion


@pytest.fixture(scope="module")
def server():
    with served(small_model(), limits=Limits(idle_seconds=0.2, tokens=100_000), max_batch=16) as (address, service):
        yield address.removeprefix("http://"), service


def connect(server):
    host, port = server[0].split(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    made.settimeout(300)
    made.connect((host, int(port)))
    return made


def until(condition):
    end = time.monotonic() + 300
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("a.localhost", 200), ("10.1.2.3", 200), ("[::1]:80", 200), ("evil.example", 403)],
)
def test_the_name_of_the_host(server, host, status):
    """A page whose name was made to lead to this machine sends that name."""
    connection = http.client.HTTPConnection(server[0], timeout=300)
    connection.request("GET", "/v1/models", headers={"Host": host})
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    assert answer.status == status
    if status == 403:
        assert told["error"]["message"].startswith("the header Host must be localhost or an address")


@pytest.mark.parametrize(
    "begun", [b"", b"GET /health HTTP/1.1\r\nHost: ", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET"]
)
def test_a_connection_without_a_request(server, begun):
    with connect(server) as idle:
        idle.sendall(begun)
        while True:
            try:
                if not idle.recv(4096):
                    break
            except ConnectionResetError:
                break


def test_a_client_that_does_not_read_its_stream(server):
    address, service = server
    asked = {"n": 16, "logprobs": 20, "max_tokens": 100_000, "stream": True}  # more than the system buffers, soon
    body = json.dumps({"model": NAME, "prompt": "a", **asked}).encode()
    with connect(server) as silent:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        silent.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: service.live == 16)
        until(lambda: service.live == 0)
    until(lambda: service.worker.engine.active == 0)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Completion, {"prompt": [1] * 20_000 + ["x"]}),
        (Completion, {"prompt": [[]] * 20_000}),
        (Completion, {"prompt": "a", "stop": [1] * 20_000}),
        (Completion, {"prompt": "a", "logit_bias": {f"{i}": "x" for i in range(20_000)}}),
        (Completion, {"prompt": "a", "logit_bias": {f"x{i}": 1 for i in range(20_000)}}),
        (Chat, {"messages": [{}] * 20_000}),
        (Chat, {"messages": [{"role": "user", "content": [{}] * 20_000}]}),
    ],
)
def test_a_list_is_refused_at_its_first_fault(kind, body):
    """A million faults of one body would be told one by one, while all other clients wait."""
    with pytest.raises(ValueError, match="validation error") as error:
        kind.model_validate_json(json.dumps({"model": NAME, **body}))
    assert error.value.error_count() < 10
