"""Ray Serve's request router over :mod:`sida_ext.serving.expert_routing`.

Ray pickles this module by value: what other modules are to share with the router, state and types, lies elsewhere.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from sida_ext.serving.expert_routing import ExpertRouting, RoutedRequest, note_reports

__all__ = ["ExpertRequestRouter"]


class ExpertRequestRouter(RequestRouter):
    """Ranks replicas for a request whose first argument is a :class:`RoutedRequest`; others go by load."""

    def initialize_state(self, **options: Any) -> None:
        """Ray calls it with ``request_router_kwargs``: the arguments of :class:`ExpertRouting`."""
        self._routing = ExpertRouting(**options)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        self._routing.present([replica.replica_id.unique_id for replica in replicas])
        said = {replica.replica_id.unique_id: dict(replica.routing_stats) for replica in replicas}
        for name, stats in said.items():
            if "held" in stats:
                self._routing.report(name, int(stats["held"], 16))
        note_reports(self.app_name, said)
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            # All are ranked at once: where none takes it, wait before the next try.
            pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in self._routing.rank(_routed(pending_request).wanted, list(by_name))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        routed = _routed(pending_request)
        self._routing.sent(replica_id.unique_id, routed.wanted, routed.weight)


def _routed(request: PendingRequest | None) -> RoutedRequest:
    first = request.args[0] if request is not None and request.args else None
    return first if isinstance(first, RoutedRequest) else RoutedRequest(0, 1)
