"""``sida serve``: loads a model and runs the server until it is told to stop."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sida_ext.progress import console
from sida_ext.serving.scheduler import Limits
from sida_ext.serving.settings import ServerSettings, read_keys

if TYPE_CHECKING:
    from sida_ext.serving.model import ServedModel

__all__ = ["load", "serve", "served_name"]


def served_name(model: str) -> str:
    """A folder's own name, or the hub id: no path of the machine."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: the folder's name or the id.")
    ] = None,
    expert_memory: Annotated[str, typer.Option(help="Budget: 2GiB, 25%, auto or bytes.")] = "auto",
    expert_dtype: Annotated[
        str, typer.Option(help="Of the experts: bfloat16, float32, float16, int8, ...")
    ] = "bfloat16",
    dense_dtype: Annotated[
        str | None, typer.Option(help="Of every other large matrix: bfloat16, int8 or int4; default: as --dtype says.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of everything else; default: the checkpoint's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    host_memory: Annotated[str | None, typer.Option(help="Pinned pool of a GPU machine.")] = None,
    store: Annotated[Path | None, typer.Option(help="A store made by sida pack.")] = None,
    predictor: Annotated[str | None, typer.Option(help="Folder made by sida train, or an entry point.")] = None,
    routing: Annotated[str, typer.Option(help="router, predicted or confident.")] = "router",
    confidence: Annotated[float, typer.Option(min=0, help="With confident: where the prediction decides.")] = 0.9,
    on_miss: Annotated[
        str, typer.Option(help="wait, or low_bit: an expert that is not there is computed from a 4-bit copy.")
    ] = "wait",
    max_low_bit: Annotated[
        float, typer.Option(min=0, max=1, help="With low_bit: share of the choices that copies serve at the most.")
    ] = 0.05,
    rows: Annotated[int, typer.Option(min=1, help="Rows that run at once.")] = 16,
    shared: Annotated[
        bool,
        typer.Option("--shared", help="Attention by kernels that rows share: faster, other bits than the model's own."),
    ] = False,
    queue: Annotated[int, typer.Option(min=1, help="Rows that wait at the most; then 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of all running rows together.")] = 65_536,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a prompt and its answer; default: the model's.")
    ] = None,
    patience: Annotated[int, typer.Option(min=0, help="How often a waiting row may be overtaken.")] = 8,
    deadline: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds for running requests after SIGTERM or Ctrl-C.")] = 30.0,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file of keys, one a line, that only its owner reads.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may call; may be repeated.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request.")] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve replicas on a Ray cluster ($RAY_ADDRESS, or this machine).")
    ] = False,
    replicas: Annotated[str, typer.Option(help="With --ray: how many; 1-4: as the load asks for.")] = "1",
    replica_cpus: Annotated[float, typer.Option(help="With --ray: processors of each replica.")] = 1.0,
    replica_memory: Annotated[str, typer.Option(help="With --ray: memory that Ray sets aside for each.")] = "0",
    imbalance: Annotated[
        float, typer.Option(help="With --ray: a replica's load over the mean at the most; 0: Ray's own routing.")
    ] = 1.25,
) -> None:
    """Serve a model over HTTP: completions, chat, embeddings, classification, metrics and a page."""
    settings = ServerSettings(
        deadline=deadline,
        drain=drain,
        keys=read_keys(api_key_file) if api_key_file is not None else (),
        cors_origins=tuple(cors_origin or ()),
    )
    limits = Limits(rows=rows, queue=queue, tokens=max_tokens, patience=patience, shared=shared)
    options: dict[str, Any] = {
        "device": device,
        "expert_memory": expert_memory,
        "host_memory": host_memory,
        "expert_dtype": expert_dtype,
        "dense_dtype": dense_dtype,
        "store": store,
        "routing": routing,
        "confidence": confidence,
        "on_miss": on_miss,
        "max_low_bit": max_low_bit,
        **({"dtype": dtype} if dtype is not None else {}),
    }
    if host not in ("127.0.0.1", "::1", "localhost") and not settings.keys:
        console.print(f"note: everybody who can reach {host} may use this server; --api-key-file asks for a key")
    if ray:
        from sida_ext.experts.budget import parse_bytes
        from sida_ext.serving.cluster import Shape, run
        from sida_ext.serving.replica import ReplicaArguments

        shape = Shape(
            replicas=replicas,
            cpus=replica_cpus,
            memory=parse_bytes(replica_memory, "replica_memory"),
            gpus=float(device != "cpu"),
            imbalance=imbalance,
        )
        arguments = ReplicaArguments(
            model, name or served_name(model), context, predictor, options, limits, settings.drain
        )
        run(arguments, shape, settings, host, port)
        return
    with _bound(host, port) as listener:  # before minutes of loading: a port that is taken is said at once
        served = load(
            model,
            name=name,
            context=context,
            rows=rows,
            predictor=predictor,
            shared=shared,
            **options,
        )
        _run(served, limits, settings, listener, verbose)


def load(
    model: str,
    *,
    name: str | None,
    context: int | None,
    rows: int,
    predictor: str | None,
    shared: bool = False,
    **options: Any,
) -> ServedModel:
    """Load what is served; ``options`` go to :func:`sida_ext.from_pretrained`."""
    from sida_ext._load import _C
    from sida_ext.experts.runtime import runtime_of
    from sida_ext.models.swap import from_pretrained
    from sida_ext.prediction.protocol import find_predictor, split_predictors
    from sida_ext.serving.model import ServedModel
    from sida_ext.texts import tokenizer_of

    tokenizer = tokenizer_of(model)
    loaded = from_pretrained(model, **options)
    if predictor is not None:
        runtime_of(loaded).predictor, runtime_of(loaded).decoder_predictor = split_predictors(
            find_predictor(predictor, loaded)
        )
    served = ServedModel(loaded, tokenizer, name or served_name(model), context=context, rows=rows, shared=shared)
    for note in served.notes:
        console.print(f"note: {note}", markup=False)
    _C.release_threads()  # the driver's thread computes from now on
    # What is there stays. The collector would look through all of it, a quarter of a second long, while requests wait.
    gc.collect()
    gc.freeze()
    return served


def _run(served: ServedModel, limits: Limits, settings: ServerSettings, listener: socket.socket, verbose: bool) -> None:
    try:
        import uvicorn

        from sida_ext.serving.server import create_app
        from sida_ext.serving.service import Service
    except ImportError as error:
        raise ImportError(
            f"sida serve needs {error.name}, which is not installed: pip install 'sida_ext[serve]'"
        ) from error
    service = Service(served, limits, settings)
    config = uvicorn.Config(
        create_app(service),
        log_level="info" if verbose else "warning",
        timeout_graceful_shutdown=round(settings.drain) + 5,
        server_header=False,
        ws="none",  # there are none, and what speaks them may warn of its own age
    )
    address, port = listener.getsockname()[:2]
    console.print(f"serving {served.name} at http://{address}:{port}", markup=False, highlight=False)
    try:
        _server(uvicorn)(config, service.drain).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again once everything has ended
    finally:
        if served.runtime is not None:
            served.runtime.close()


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port") from error
    listener.listen(2048)
    return listener


def _server(uvicorn: Any) -> type[Any]:
    class Draining(uvicorn.Server):
        """Tells the service at once that it is to end: its endless streams then end too."""

        def __init__(self, config: Any, drain: Callable[[], None]) -> None:
            super().__init__(config)
            self._drain = drain

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self._drain()
            super().handle_exit(sig, frame)

    return Draining
