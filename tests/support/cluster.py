"""A Ray cluster of this machine with served applications, and load on them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Application", "cluster"]


@contextmanager
def cluster(port: int, cpus: int = 8) -> Iterator[None]:
    """Ray and Serve's proxy on this machine; ``cpus`` is what Ray believes there are."""
    import ray
    from ray import serve

    ray.init(
        num_cpus=cpus,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


class Application:
    """One served application, at a path of its own.

    Args:
        port: of the proxy.
        path: where it is served, and the name of the application.
        given: see :func:`sida_ext.serving.cluster.app`.
    """

    def __init__(self, port: int, path: str, **given: str) -> None:
        self.url, self.name, self.given = f"http://127.0.0.1:{port}/{path}", path, given
        self.deploy()

    def deploy(self, **changed: str) -> None:
        """Start it, or change it where it runs."""
        from ray import serve

        from sida_ext.serving.cluster import app

        self.given |= changed
        serve.run(app(self.given), name=self.name, route_prefix=f"/{self.name}")

    def delete(self) -> None:
        """Stop it, replicas too."""
        from ray import serve

        serve.delete(self.name)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Of ``/metrics`` each replica's numbers, by name without ``sida_replica_`` and ``_total``; and ``retries``."""
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=60).text):
            for sample in family.samples:
                if "replica" in sample.labels:
                    name = sample.name.removeprefix("sida_replica_").removesuffix("_total")
                    found.setdefault(name, {})[sample.labels["replica"]] = sample.value
                elif sample.name == "sida_server_retries_total":
                    found["retries"] = {"": sample.value}
        return found

    @property
    def retries(self) -> float:
        return self.metrics()["retries"][""]

    def _actors(self) -> dict[str, Any]:
        import ray

        names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]
        start = f"SERVE_REPLICA::{self.name}#sida-replicas#"
        return {
            name.removeprefix(start): ray.get_actor(name, namespace="serve")
            for name in sorted(names)
            if name.startswith(start)
        }

    def totals(self) -> dict[str, dict[str, Any]]:
        """What each replica says of itself now, asked without the router: name, then replica."""
        import ray

        found: dict[str, dict[str, Any]] = {}
        for replica, actor in self._actors().items():
            for name, value in ray.get(actor.record_routing_stats.remote(), timeout=60).items():
                found.setdefault(name, {})[replica] = value
        return found

    def wait_replicas(self, count: int, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if httpx.get(f"{self.url}/health", timeout=60).json().get("replicas") == count:
                return
            time.sleep(0.25)
        raise TimeoutError(f"{self.name} has not had {count} replicas within {seconds:.0f} s")

    def kill_one(self) -> str:
        """Kill a replica's process as the system would; its name."""
        import ray

        name, actor = next(iter(self._actors().items()))
        ray.kill(actor)
        return name

    def load(
        self, texts: Sequence[list[int]], clients: int, under_way: threading.Event | None = None
    ) -> tuple[Counter[int], list[Any]]:
        """Classify all texts; how often each status came, and the answers in the texts' order.

        Args:
            under_way: set once every client has had an answer on the average.
        """
        statuses: Counter[int] = Counter()
        answers: list[Any] = [None] * len(texts)
        todo, lock = iter(enumerate(texts)), threading.Lock()

        def one() -> None:
            with httpx.Client(timeout=120, verify=False) as client:
                while True:
                    with lock:
                        number, ids = next(todo, (None, None))
                    if number is None:
                        return
                    found = client.post(f"{self.url}/classify", json={"input": ids})
                    with lock:
                        statuses[found.status_code] += 1
                        if under_way is not None and statuses.total() >= clients:
                            under_way.set()
                    answers[number] = found.json()

        threads = [threading.Thread(target=one) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statuses, answers
