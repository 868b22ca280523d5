"""`rollstream serve vllm`: rollout servers; `rollstream bench rollout`: how fast they are."""

from __future__ import annotations

from typing import Annotated

import typer

from broker_schemas.errors import ConfigError
from rollstream.commands.help_pages import command_group
from rollstream.commands.options import ConfigPath, Overrides

serve_app = command_group()
Index = Annotated[int | None, typer.Option(help="start this server alone, counted from 0")]
Host = Annotated[str | None, typer.Option(help="interface to listen on; default as base_url says")]
Gpus = Annotated[str | None, typer.Option(help="GPU numbers such as 0,1 instead of devices.rollout_gpus")]
NumImages = Annotated[int, typer.Option(help="most images of a prompt", min=1)]
Flags = Annotated[
    list[str] | None, typer.Option("--flag", help="more for vllm serve, such as --flag=--seed=1")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(serve_app, name="serve", help="Start rollout servers.")


@serve_app.callback()
def _group() -> None:
    """Start rollout servers."""


@serve_app.command()
def vllm(
    config: ConfigPath,
    overrides: Overrides = None,
    index: Index = None,
    host: Host = None,
    gpus: Gpus = None,
    num_images: NumImages = 1,
    flags: Flags = None,
) -> None:
    """Start the run's vLLM servers on this machine and show their log; Ctrl-C stops them."""
    from configs import load_config
    from rollstream.vllm.plan import ServeOptions
    from rollstream.vllm.serving import serve
    from rollstream.wiring.access import log_to_stderr

    loaded = load_config(config, tuple(overrides or ()))
    log_to_stderr(loaded.run.name, "serve", index or 0)
    options = ServeOptions(
        index=index,
        host=host,
        gpus=_gpu_numbers(gpus),
        num_images=num_images,
        extra_flags=tuple(flags or ()),
    )
    status = serve(loaded, options)
    if status:
        raise typer.Exit(status)


def _gpu_numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as exc:
        raise ConfigError(f"--gpus: got {text!r}, expected numbers such as 0,1") from exc
