"""`linker serve`: signals and the HTTP server around the application."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import shlex
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn

from linker_core.errors import InvalidRequestError
from linker_core.started_threads import started_threads
from server.cli.device import check_device
from server.cli.loop_errors import LoopErrors
from server.cli.serve_options import add_arguments, settings_from, startup_requests
from server.gateway.app import create_app
from server.gateway.connection import server_config
from server.gateway.services import Services, build_services
from server.onboarding.request import OnboardRequest
from server.registry.records import Role
from server.settings import Settings

logger = logging.getLogger(__name__)

__all__ = ["add_arguments", "run"]  # what a command is; the options stand in a file of their own

EXIT_FAILED = 1
MAKE_KEY = "linker keys create NAME --role admin"
_POLL_S = 0.2
_LAST_WORDS_S = 5.0  # for terminal errors to be written
_FILES = 65536
_LAST_CALL_S = 0.25  # for those to be refused who connected as the server stopped


def run(args: argparse.Namespace) -> int:
    """Serves until a signal; 0 after a clean drain."""
    settings = settings_from(args)
    requests = startup_requests(settings)
    check_device(settings.engine.device)
    make_key = _key_command(args)
    return serve_until_stopped(settings, requests, build=build_services, make_key=make_key)


def serve_until_stopped(
    settings: Settings,
    requests: list[OnboardRequest],
    *,
    build: Callable[[Settings], Services],
    make_key: str = MAKE_KEY,
) -> int:
    """Serves what is built until a signal; returns the exit status, 0 after a clean drain.

    Args:
        settings: Of the server.
        requests: The models to start with.
        build: Makes the parts.
        make_key: The command that makes an operator's key for this server.
    """
    raise_file_limit()
    return asyncio.run(_serve(settings, requests, build, make_key))


def _key_command(args: argparse.Namespace) -> str:
    """Returns the command that makes a key for the server that this command line starts."""
    given = (("--config", args.config), ("--state", args.state))
    options = [(flag, str(path.absolute())) for flag, path in given if path is not None]
    return " ".join([MAKE_KEY, *(shlex.join(option) for option in options)])


def check_access(services: Services, make_key: str) -> None:
    """Says who may use the server, unless nobody could or everybody might by mistake.

    Args:
        services: Of the server.
        make_key: The command that makes an operator's key for it.

    Raises:
        InvalidRequestError: It would listen beyond the loopback, and has no keys.
    """
    http, keys = services.settings.http, services.keys
    if http.no_auth:
        logger.warning("--no-auth: whoever reaches %s may do everything, without a key", http.host)
    elif keys.are_optional:
        logger.info(
            "no API keys: whoever is on this machine may do everything; `%s` makes the first one, "
            "and then every request needs one",
            make_key,
        )
    elif not keys.roles:
        raise InvalidRequestError(
            f"There is no API key, or none that is not revoked, to let anybody use {http.host}. "
            f"Make one with `{make_key}`; or say --no-auth, and whoever reaches the server may do "
            "everything.",
            param="host",
        )
    elif Role.ADMIN not in keys.roles:
        logger.warning("no key may manage models; `%s` makes one", make_key)


def _say_sources(settings: Settings) -> None:
    if settings.models.root is None and not settings.models.serve:
        logger.info("no --model and no --models-root: only hub: sources can be onboarded")


class _HttpServer(uvicorn.Server):
    """uvicorn, except that signals are ours: it would raise a caught signal again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def protocol(self) -> asyncio.Protocol:
        """Returns what serves one connection, as uvicorn makes it for those that it accepts."""
        make = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        return make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


async def _serve(
    settings: Settings,
    requests: list[OnboardRequest],
    build: Callable[[Settings], Services],
    make_key: str,
) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(LoopErrors())
    loop.set_default_executor(started_threads(_num_threads(), "work"))
    listener = listen(settings.http.host, settings.http.port)
    services = build(settings)
    try:
        check_access(services, make_key)
    except InvalidRequestError:
        listener.close()
        await services.stop()
        raise
    _say_sources(settings)
    app, refused = create_app(services), services.metrics.rejected
    config = server_config(app, settings.http, on_refused=refused)
    wanted, limit = settings.http.max_connections, config.peers.limit
    if limit < wanted:
        logger.warning(
            "http.max_connections is %d, and there are file descriptors for %d; raise the limit of "
            "open files",
            *(wanted, limit),
        )
    server = _HttpServer(config)
    stopping = asyncio.Event()
    _install_signals(services, stopping)
    listening = asyncio.ensure_future(server.serve(sockets=[listener]))
    logger.info("listening on http://%s:%d (its page: /ui)", *listener.getsockname()[:2])
    try:
        await services.start(requests)
        # Modules and routes stay for good: walking them all took 98 ms in the midst of streams.
        gc.collect()
        gc.freeze()
        status = await _until_end(services, listening, stopping)
        why = _why_failed(services)
        config.is_winding_down = True
        status = await _finish(services, status)
        await _close_the_door(server, listener)
    finally:
        server.should_exit = True
        await asyncio.gather(listening, return_exceptions=True)
        await services.stop()
    if why is not None and not stopping.is_set():
        logger.error("--strict: %s", why)  # the last words, where they are looked for
    return status


def _num_threads() -> int:
    """Returns how many threads blocking work has, which is as many as asyncio would take."""
    return min(32, (os.cpu_count() or 1) + 4)


def listen(host: str, port: int) -> socket.socket:
    """Binds before anything is started, so that a port in use costs nothing.

    Raises:
        InvalidRequestError: The port is in use, or the interface is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidRequestError(
            f"Cannot listen on {host} port {port}: {error.strerror}. Choose another --port.",
            param="port",
        ) from error
    # Connections inherit it. Without it the second packet of an answer waits 40 ms for the client's
    # acknowledgement of the first; asyncio sets it only on sockets that name their protocol.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def _close_the_door(server: _HttpServer, listener: socket.socket) -> None:
    """Lets those in who are at the door, to be told: with the socket they would be hung up on."""
    listener.setblocking(False)
    listener.listen(0)  # no crowd any more
    await asyncio.sleep(_LAST_CALL_S)
    let_in = list(_at_the_door(listener))
    for acceptor in server.servers:
        acceptor.close()
    loop = asyncio.get_running_loop()
    for connection in let_in:
        await loop.connect_accepted_socket(server.protocol, connection)


def _at_the_door(listener: socket.socket) -> Iterator[socket.socket]:
    with contextlib.suppress(OSError):  # nobody, most often
        while True:
            yield listener.accept()[0]


def raise_file_limit() -> None:
    """Takes as many file descriptors as may be had: every connection needs one."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _FILES if most == resource.RLIM_INFINITY else min(_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, enough), most))


def _install_signals(services: Services, stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stopping.is_set():
            logger.warning("a second signal: ending at once, answers that still run break off")
            services.engine.kill()
            os._exit(EXIT_FAILED)
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)


async def _until_end(
    services: Services, listening: asyncio.Future[None], stopping: asyncio.Event
) -> int:
    """Waits for a reason to end; 0 for a signal, else the exit status of a failure."""
    signalled = asyncio.ensure_future(stopping.wait())
    given_up = asyncio.ensure_future(services.engine.given_up.wait())
    reasons: list[asyncio.Future[Any]] = [signalled, given_up, listening, *services.tasks]
    if services.settings.http.strict:
        reasons.append(asyncio.ensure_future(_strict_failure(services)))
    await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
    if signalled.done():
        return 0
    for task in (listening, *services.tasks):
        if task.done() and not task.cancelled() and task.exception() is not None:
            logger.error("the server cannot go on", exc_info=task.exception())
    return EXIT_FAILED


async def _strict_failure(services: Services) -> None:
    """Returns when a start-up model has failed; waits for ever if none does."""
    while (failed := services.onboarder.startup_failures()) is None:
        await asyncio.sleep(_POLL_S)
    if not failed:
        await asyncio.Event().wait()
    logger.error("start-up models failed: %s; leaving", ", ".join(failed))


def _why_failed(services: Services) -> str | None:
    """Returns which start-up models failed and why, for a server that leaves for that."""
    if not services.settings.http.strict:
        return None
    failed = services.onboarder.startup_failures() or ()
    errors = ((name, services.roster.model(name).error) for name in failed)
    causes = [name if error is None else f"{name}: {error['message']}" for name, error in errors]
    return f"start-up models failed: {'; '.join(causes)}" if causes else None


async def _finish(services: Services, status: int) -> int:
    """Ends what still runs, as it becomes the reason to end; returns the exit status."""
    if status == 0:
        return await _drain(services)
    await _break_off(services)
    return status


async def _drain(services: Services) -> int:
    """Lets running requests finish; those that do not in time get a terminal error."""
    deadline_s = services.settings.http.drain_s
    logger.info(
        "draining for at most %.0f s (answers still running: %d); a second signal, such as Ctrl-C "
        "again, ends at once",
        *(deadline_s, services.gate.num_running),
    )
    if await services.gate.drain(deadline_s):
        return 0
    await _break_off(services)
    return EXIT_FAILED


async def _break_off(services: Services) -> None:
    """Ends what still runs with an error that its clients get to see."""
    services.gate.close()
    services.engine.fail_all("The server shut down before the answer was complete.")
    await services.gate.drain(_LAST_WORDS_S)
