"""`coral serve`: a target and its drafter behind OpenAI's protocol."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from coral.cli import options
from coral.errors import CoralError


def serve(
    target: options.Target = None,
    drafter: options.Drafter = None,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is every one that the machine has.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that requests must bring; may be given again.",
            envvar="CORAL_API_KEY",
            show_envvar=True,
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's in requests. Default: --target.")] = None,
    max_batch: Annotated[int, typer.Option(help="Texts that are written at once.", min=1)] = 16,
    memory_gb: Annotated[
        float | None,
        typer.Option(help="For keys and values. Default: half of what is free.", min=0.001),
    ] = None,
    queue: Annotated[int, typer.Option(help="Texts that may wait; more are refused (429).", min=0)] = 64,
    max_tokens: Annotated[
        int, typer.Option(help="Longest answer, in tokens, to a request that names no limit.", min=1)
    ] = 1024,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    tree: options.Tree = None,
    backend: options.Backend = "auto",
    head: options.Head = "auto",
    coupled: options.Coupled = True,
    fallback: options.Fallback = True,
    revision: options.Revision = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Serve a target with its drafter over HTTP, as OpenAI's API. The texts are the target's own.

    Routes: / (a page to chat on), /v1/chat/completions, /v1/completions, /v1/models, /tokenize, /detokenize,
    /health, /metrics and /version. SIGTERM ends it once what it writes is written.
    """
    try:
        import uvicorn

        from coral.serving.http import Limits, create_app
    except ImportError as error:
        raise CoralError(
            f"serving needs {error.name}, which is not installed; run pip install 'coral-drafter[serve]'."
        ) from error
    from coral.serving.worker import Worker
    from coral.target import default as models

    tree_size = options.read_tree_size(tree)
    options.quiet_transformers()

    def load() -> Any:
        import coral

        return coral.load(
            target,
            drafter,
            dtype=dtype,
            device=device,
            tree=tree_size,
            backend=backend,
            head=head,
            coupled=coupled,
            fallback=fallback,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )

    def end() -> None:
        server.should_exit = True

    worker = Worker(load, max_batch, None if memory_gb is None else memory_gb * 1e9, failed=end)
    limits = Limits(queue=queue, longest=max_tokens)
    app = create_app(worker, name or target or models.SMOLLM2.name, api_key or (), limits)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="info"))
    server.run()
    if worker.failure:
        raise worker.failure
