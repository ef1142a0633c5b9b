"""A light HTTP client in a process of its own: one thread and the standard library's sockets, so that it starts at once
and takes little from the server that is measured, which shares the cores with it. Reads one JSON object from standard
input, writes one to standard output."""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator

MOST_SECONDS = 600.0  # without any answer


class Connection:
    """One client: it asks again as soon as it is answered."""

    def __init__(self, port: int, todo: Iterator[tuple[int, bytes]]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.todo = todo
        self.number, self.begin, self.taken = 0, 0.0, b""

    def ask(self) -> bool:
        """Send the next request; False if there is none."""
        self.number, request = next(self.todo, (-1, b""))
        if self.number < 0:
            return False
        self.taken, self.begin = b"", time.perf_counter()
        self.socket.sendall(request)
        return True

    def take(self) -> bytes | None:
        """Read what is there: the whole answer, or None as long as it is not complete."""
        part = self.socket.recv(1 << 20)
        if not part:
            raise RuntimeError(f"the server closed the connection in the middle of an answer: {self.taken[:500]!r}")
        self.taken += part
        head, complete, body = self.taken.partition(b"\r\n\r\n")
        if not complete:
            return None
        _, found, length = head.lower().partition(b"content-length:")
        if not found:
            raise RuntimeError(f"an answer without Content-Length: {self.taken[:500]!r}")
        return self.taken if len(body) >= int(length.split(b"\r\n", 1)[0]) else None


def drive(port: int, requests: list[bytes], clients: int) -> tuple[float, list[float], list[bytes]]:
    """Seconds for all, each one's latency, each one's answer."""
    latencies, answers = [0.0] * len(requests), [b""] * len(requests)
    todo = iter(enumerate(requests))
    connections = [Connection(port, todo) for _ in range(clients)]
    selector = selectors.DefaultSelector()
    begin = time.perf_counter()
    for connection in connections:
        if connection.ask():
            selector.register(connection.socket, selectors.EVENT_READ, connection)
    while selector.get_map():
        ready = selector.select(MOST_SECONDS)
        if not ready:
            raise RuntimeError(f"no answer within {MOST_SECONDS:g} s")
        for key, _ in ready:
            connection = key.data
            answer = connection.take()
            if answer is None:
                continue
            latencies[connection.number] = time.perf_counter() - connection.begin
            answers[connection.number] = answer
            if not connection.ask():
                selector.unregister(connection.socket)
    seconds = time.perf_counter() - begin
    for connection in connections:
        connection.socket.close()
    return seconds, latencies, answers


def main() -> None:
    given = json.load(sys.stdin)
    requests = []
    for body in (json.dumps(each).encode() for each in given["bodies"]):
        head = f"POST {given['path']} HTTP/1.1\r\nHost: 127.0.0.1:{given['port']}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        requests.append(head.encode() + body)
    seconds, latencies, answers = drive(given["port"], requests, given["clients"])
    problems, written = [], 0
    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1].decode()
        if status == "200":
            written += json.loads(body)["usage"].get("completion_tokens", 0)
        else:
            problems.append(f"status {status}: {body[:500]!r}")
    json.dump({"seconds": seconds, "latencies": latencies, "written": written, "problems": problems}, sys.stdout)


if __name__ == "__main__":
    main()
