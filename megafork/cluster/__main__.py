"""`python -m megafork.cluster run ...`, on every machine of a run, and `... run-dir CONFIG`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from megafork.cluster.coordinator import Coordinator, End
from megafork.cluster.launch import Machines
from megafork.cluster.node_launcher import NodeLauncher, Work
from megafork.cluster.node_messages import Failure, Plan
from megafork.config import TrainConfig
from megafork.config.load import load_config
from megafork.errors import USER_ERROR, UserError
from megafork.rollout.placement import visible_gpus

_SERVER_RESTARTS = 3
_PATIENCE_S = 1.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Argument(help="the run's TOML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value")]


@app.command()
def run_dir(config: Config, overrides: Overrides = None) -> None:
    """Print run.dir, which may come from the file or from an override."""
    typer.echo(load_config(TrainConfig, config, overrides or []).run.dir)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    train: Annotated[str, typer.Option(help="machines with ranks, NAME,NAME")] = "",
    serve: Annotated[str, typer.Option(help="machines with rollout servers, NAME,NAME")] = "",
    logs: Annotated[Path, typer.Option(help="folder for this attempt's logs")] = Path("logs"),
    resume: Annotated[Path | None, typer.Option(help="the run's folder, to go on with it")] = None,
    ranks: Annotated[int, typer.Option(help="ranks on each training machine", min=1)] = 1,
    servers: Annotated[int, typer.Option(help="servers on each serving machine", min=1)] = 1,
    port: Annotated[int, typer.Option(help="of the first machine")] = 20_000,
    serve_port: Annotated[int, typer.Option(help="of a machine's first server")] = 20_001,
    startup_s: Annotated[float, typer.Option(help="seconds for all launchers to come")] = 60.0,
    lost_after_s: Annotated[float, typer.Option(help="of silence: the machine is lost")] = 30.0,
) -> None:
    """Launch and watch this machine, $SLURMD_NODENAME or its host name; --train or --serve has it.

    Exits with 0 when the run is complete, 75 when it was asked to stop and has saved, 69 when a
    machine was lost, and otherwise with the status of what failed first, which is told last. The
    first machine leaves both in LOGS, as status and cause. $MEGAFORK_API_KEY is the secret that
    launchers, servers and trainer share.
    """
    api_key = os.environ.get("MEGAFORK_API_KEY")
    if not api_key:
        raise UserError("MEGAFORK_API_KEY is not set: give all machines of the run the same secret")
    training, serving = _names(train), _names(serve)
    plan = Plan(training, serving, port, api_key.encode(), logs, startup_s, lost_after_s)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if plan.nodes.count(node) != 1:
        raise UserError(f"this machine, {node}, has to be named once in --train or --serve")
    logs.mkdir(parents=True, exist_ok=True)
    settings, refused = overrides or [], None
    if node in serving:
        own = config if resume is None else resume / "config.toml"  # what the ranks go on with
        try:
            works = _servers(own, settings, node, logs, servers, serve_port)
        except UserError as error:  # told by the coordinator: a launcher that stays away is lost
            works, refused = [], Failure(node, USER_ERROR, str(error), None)
    else:
        urls = [f"http://{n}:{serve_port + i}" for n in serving for i in range(servers)]
        if not urls and resume is not None:  # its config may name servers of a former start
            urls = load_config(TrainConfig, config, settings).rollout.urls
        if urls or resume is not None:
            settings = [*settings, f"rollout.url={json.dumps(urls[0] if len(urls) == 1 else urls)}"]
        start = ["--resume", str(resume)] if resume is not None else [str(config)]
        machines = Machines(len(training), training.index(node), ranks, str(logs))
        works = [
            Work(
                "megafork-train",
                [sys.executable, "-m", "megafork", "train", *start, *settings],
                environment=machines.environment(),
            )
        ]
    raise typer.Exit(asyncio.run(launch_and_tell(plan, NodeLauncher(plan, node, works, refused))))


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _servers(
    config: Path, settings: list[str], node: str, logs: Path, count: int, first_port: int
) -> list[Work]:
    works = []
    devices = visible_gpus()
    share = len(devices) // count
    if devices and not share:
        raise UserError(f"--servers {count} on {len(devices)} GPUs of {node}: ask for fewer")
    for i in range(count):
        log = logs / f"serve-{node}-{i}.log"
        command = [sys.executable, "-m", "megafork", "serve", str(config), *settings]
        command += ["--host", node, "--port", str(first_port + i)]
        command += ["--log", str(logs / f"vllm-{node}-{i}.log")]
        own = {}
        if count > 1 and share:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(devices[i * share : (i + 1) * share])
        works.append(Work(f"server-{i}", command, log, _SERVER_RESTARTS, own))
    return works


async def launch_and_tell(plan: Plan, launcher: NodeLauncher) -> int:
    """Launch, and on the first machine coordinate; return the run's exit status."""
    if launcher.node != plan.first_node:
        return await launcher.run()
    own = asyncio.create_task(launcher.run())
    end: End = await Coordinator(plan).run()
    if not (await asyncio.wait([own], timeout=_PATIENCE_S))[0]:
        own.cancel()  # it never reached the coordinator
    if end.cause:
        told = f"error: {end.cause}"
        print(told, file=sys.stderr, flush=True)
        _leave(plan.logs / "cause", told)
    _leave(plan.logs / "status", str(end.status))
    with contextlib.suppress(asyncio.CancelledError):
        await own  # raises what it failed of
    return end.status


def _leave(path: Path, text: str) -> None:
    """Write the text; if that fails, warn alone, since our exit status and output tell it too."""
    try:
        path.write_text(text + "\n")
    except OSError as error:
        print(f"warning: {path} cannot be written: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):
            path.unlink()  # it would be empty


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
