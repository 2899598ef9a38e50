"""One running installation: data lock, engine, release, web and scheduler, from start to clean stop.

The web answers at once; the engine boots behind it and the pages say so until it is ready.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import uvicorn
import uvloop

from assistant.accounts import first_administrator
from assistant.admission import Limits
from assistant.base_model import find_model
from assistant.chat import Chat
from assistant.engine.errors import EngineAbsent, EngineStarting, EngineUnavailable
from assistant.engine.protocol import Engine
from assistant.engine.supervisor import VllmOptions, VllmProcess, choose_engine
from assistant.engine.vllm import VllmEngine
from assistant.release import Release
from assistant.web.services import Services
from storage import deployments, policies, runs
from storage.digests import base_digest
from storage.errors import Busy, InvalidField
from storage.failures import record_failure
from storage.lock import DataLock
from storage.records import Person, Policy, RunTrigger
from storage.runs import NextRun
from storage.store import Store

log = logging.getLogger("kotae")

DRAIN_S = 10
"""How long running answers may go on after Ctrl-C or SIGTERM."""
SWITCH_S = 0.0005
"""Python's 5 ms between threads would be waited at each of the dozen statements of a transaction while answers stream,
and everybody who writes would wait behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `serve` was asked for."""

    data: Path
    model: str
    engine: str
    engine_urls: tuple[str, ...]
    host: str
    port: int
    behind_https: bool
    """A TLS proxy stands in front: session cookies go over https only."""
    limits: Limits = field(default_factory=Limits)
    """Answers under way at once; beyond them requests are told to come back."""
    probe_tolerance_nats: float | None = None
    """Most that a log-prob of the probes may differ from the trainer's; None: by the arithmetic of both."""
    gpu_memory_share: float = 0.5
    """Of a GPU's memory, for the managed vLLM; a run on the same card takes `gpu_memory_share` of its configuration."""
    align_command: tuple[str, ...]
    """Starts one alignment run in a process of its own; the trigger is appended."""

    def __post_init__(self) -> None:
        tolerance = self.probe_tolerance_nats
        if tolerance is not None and not tolerance > 0:
            raise InvalidField("--probe-tolerance", tolerance, "use a number of nats above 0")
        if not 0 < self.gpu_memory_share <= 1:
            raise InvalidField("--gpu-memory-share", self.gpu_memory_share, "use a number above 0, at most 1")
        for url in self.engine_urls:
            check_engine_url(url)


def check_engine_url(url: str) -> None:
    """Raise InvalidField unless `url` is the address of a server: without a scheme it would be taken and never answer."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        is_address = False
    if not is_address or parts.query or parts.fragment:
        raise InvalidField(
            "--engine-url", url, "give it as http://HOST:PORT or https://HOST, as of a vLLM server"
        )


class Scheduler(Protocol):
    """Starts runs on a cron and after enough new labels (`alignment.schedule`)."""

    def start(self) -> None:
        """Begin to watch the clock and the labels."""

    def stop(self) -> None:
        """Stop watching; a run that is going on continues."""

    def next_run(self) -> NextRun:
        """Return what starts the next run."""


MakeScheduler = Callable[[Store, Callable[[RunTrigger], None]], Scheduler]


def serve_until_stopped(options: ServeOptions, *, make_scheduler: MakeScheduler) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    url = f"http://{options.host}:{options.port}"
    check_port_free(options.host, options.port)
    with DataLock(options.data, url=url):
        store = Store(options.data)
        for run in runs.mark_dead_runs(store):
            log.warning("run %s was found dead: %s", run.id, run.message)
        base = register_model(store, options.model)
        tell_administrator(store, url)
        launcher = RunLauncher(store, options.align_command)
        scheduler = make_scheduler(store, lambda trigger: launcher.launch(trigger, None))
        sys.setswitchinterval(SWITCH_S)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(options, store, base, launcher, scheduler))
        store.close()
    return 0


def register_model(store: Store, model: str) -> Policy:
    """Record the base model and make sure that something is deployed; returns the base policy.

    Another base than before is deployed as it is: adapters belong to the base they were trained on.
    """
    folder = find_model(model)
    base = policies.register_base(store, base_path=str(folder), base_sha256=base_digest(folder))
    served = deployments.served(store)
    if served is None or store.get(Policy, served.stable.policy_id).base_sha256 != base.base_sha256:
        reason = "first start" if served is None else f"the base model is now {model}"
        deployments.deploy(store, policy_id=base.id, role="stable", share=1.0, actor="system", reason=reason)
    return base


def tell_administrator(store: Store, url: str) -> None:
    """Print where to go and, on the first start, how to sign in."""
    password = first_administrator(store)
    print(f"\n  答え Kotae   {url}\n", flush=True)
    if password is not None:
        print(f"  First start. Sign in as: admin\n  one-time password:       {password}\n", flush=True)


def check_port_free(host: str, port: int) -> None:
    """Raise InvalidField when there is no such port, or somebody listens there already."""
    if not 0 <= port < 65_536:
        raise InvalidField("--port", port, "use one from 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidField(
                "--host/--port", f"{host}:{port}", f"{error.strerror}; choose another, e.g. --port {port + 1}"
            ) from error


class RunLauncher:
    """Starts alignment runs as processes that outlive a restart of the server."""

    def __init__(self, store: Store, command: Sequence[str]) -> None:
        self._store = store
        self._command = tuple(command)

    def launch(self, trigger: RunTrigger, person: Person | None) -> None:
        """Start a run and return at once.

        Raises:
            Busy: a run is going on.
        """
        running = runs.running(self._store)
        if running is not None:
            raise Busy(f"run {running.id} is going on; wait until it ends")
        logs = self._store.data / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "align.log").open("ab") as out:
            process = subprocess.Popen(
                [*self._command, "--trigger", trigger],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1"},
            )
        # Without a waiter a dead run would stay a zombie, and look alive.
        threading.Thread(target=process.wait, name=f"run-{process.pid}", daemon=True).start()
        log.info("started an alignment run (%s%s)", trigger, f" by {person.name}" if person else "")


async def _serve(
    options: ServeOptions, store: Store, base: Policy, launcher: RunLauncher, scheduler: Scheduler
) -> None:
    from assistant.web.server import build_app

    async with running_engine(options, base, on_death=lambda: note_death(store)) as engine:
        release = Release(store, engine, probe_tolerance_nats=options.probe_tolerance_nats)
        services = Services(
            store=store,
            engine=engine,
            release=release,
            chat=Chat(store, engine, release, limits=options.limits),
            launch_run=launcher.launch,
            next_run=scheduler.next_run,
            model_name=Path(base.base_path).name,
        )
        web = build_app(services, secure_cookies=options.behind_https)
        keep_for_good()
        config = uvicorn.Config(
            web,
            host=options.host,
            port=options.port,
            log_level="warning",
            timeout_graceful_shutdown=DRAIN_S,
            access_log=False,
        )
        scheduler.start()
        try:
            with signals_left_to_uvicorn():
                await uvicorn.Server(config).serve()
        finally:
            scheduler.stop()


def keep_for_good() -> None:
    """Let Python look for garbage in what is made from now on only.

    The pages are 350,000 objects that live as long as the process. To go through them took a quarter of a second, every few
    hundred answers, in which nobody's answer went on.
    """
    gc.collect()
    gc.freeze()


@asynccontextmanager
async def running_engine(
    options: ServeOptions, base: Policy, *, on_death: Callable[[], None]
) -> AsyncIterator[Engine]:
    """Yield the engine that was asked for; a managed vLLM goes on booting behind it.

    Args:
        on_death: called when a managed vLLM is back after it had died.
    """
    if options.engine_urls:
        yield VllmEngine(options.engine_urls, base_name=base.id)
        return
    if options.engine == "local" or (options.engine == "auto" and choose_engine() == "local"):
        from assistant.engine.local import LocalEngine

        yield LocalEngine(base.base_path, base_name=base.id)
        return
    boot = Boot()

    async def back_again() -> None:
        await asyncio.to_thread(on_death)

    vllm = VllmProcess(
        VllmOptions(
            model=base.base_path,
            base_name=base.id,
            data=options.data,
            gpu_memory_fraction=options.gpu_memory_share,
        ),
        on_progress=boot.tell,
        on_restart=back_again,
    )
    booting = asyncio.create_task(_boot(vllm), name="vllm-boot")
    try:
        yield VllmEngine(
            [vllm.url],
            base_name=base.id,
            explain=lambda: boot.explain(vllm),
            in_float32=vllm.in_float32,
        )
    finally:
        booting.cancel()
        with suppress(asyncio.CancelledError):
            await booting
        await vllm.stop()


def note_death(store: Store) -> None:
    """Book the engine's end on what was new in it."""
    served = deployments.served(store)
    if served is not None:
        new = [row for row in (served.canary, served.shadow) if row is not None]
        for row in new or [served.stable]:
            record_failure(store, policy_id=row.policy_id, kind="engine_died")


async def _boot(vllm: VllmProcess) -> None:
    try:
        await vllm.start(keep_trying=True)
    except EngineUnavailable as error:
        log.error("%s", error)


@dataclass(slots=True)
class Boot:
    """Where vLLM's boot is, and why it had to be started again: told in the terminal, and to people who ask too early."""

    stage: str = "starting"
    elapsed_s: float = 0.0

    def tell(self, stage: str, elapsed_s: float) -> None:
        """Print each stage once."""
        if stage != self.stage:
            print(f"  vLLM  {elapsed_s:5.1f} s  {stage}", flush=True)
        self.stage, self.elapsed_s = stage, elapsed_s

    def explain(self, vllm: VllmProcess) -> EngineAbsent | None:
        """Return why vLLM does not answer; None when it should."""
        if vllm.state in ("starting", "restarting"):
            where = f"{self.stage}, {self.elapsed_s:.0f} s"
            before = f"; {vllm.detail}" if vllm.state == "restarting" else ""
            return EngineStarting(f"the model is starting ({where}); ask again in a moment{before}")
        return None if vllm.state == "ready" else EngineAbsent(f"the model is not running: {vllm.detail}")


@contextmanager
def signals_left_to_uvicorn() -> Iterator[None]:
    """Let uvicorn end gracefully on SIGINT and SIGTERM, and this process outlive it to clean up.

    uvicorn raises the signal again when it is done, for whoever handled it before: here nobody needs it.
    """
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
