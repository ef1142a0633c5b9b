"""A light HTTP client in a process of its own: standard library alone, so that it starts at once and takes little from
the server that is measured. Reads one JSON object from standard input, writes one to standard output."""

import http.client
import json
import sys
import threading
import time


def main() -> None:
    given = json.load(sys.stdin)
    bodies = [json.dumps(body).encode() for body in given["bodies"]]
    todo, lock = iter(enumerate(bodies)), threading.Lock()
    latencies, written, problems = [0.0] * len(bodies), [0] * len(bodies), []

    def one() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", given["port"], timeout=600)
        connection.connect()
        ready.wait()
        while True:
            with lock:
                number, body = next(todo, (None, b""))
            if number is None:
                return
            begin = time.perf_counter()
            connection.request("POST", given["path"], body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            text = reply.read()
            latencies[number] = time.perf_counter() - begin
            if reply.status != 200:
                problems.append(f"status {reply.status}: {text[:500]!r}")
                return
            written[number] = json.loads(text)["usage"].get("completion_tokens", 0)

    ready = threading.Barrier(given["clients"] + 1)
    threads = [threading.Thread(target=one) for _ in range(given["clients"])]
    for thread in threads:
        thread.start()
    ready.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    json.dump({"seconds": seconds, "latencies": latencies, "written": sum(written), "problems": problems}, sys.stdout)


if __name__ == "__main__":
    main()
