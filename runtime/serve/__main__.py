"""Serve a bundle: `python -m runtime.serve build/NAME`, then open the address it prints."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import signal
import socket
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from engines.checks import require_integer
from engines.errors import OptionError
from engines.open import add_opening_options, add_slot_options, opening_options
from plugins import command
from runtime.engine import Engine
from runtime.serve.application import app
from runtime.serve.settings import KEY_VARIABLE, Settings, read_api_key
from runtime.serve.worker import Worker

HOST, PORT = "127.0.0.1", 8000
_LOG_LEVELS = ("error", "warning", "info")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; --help shows every default."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.serve", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("bundle", type=Path, help="folder written by export/build.py")
    add("--host", default=HOST, help="address to listen at; another than this machine's own needs a key or --no-auth")
    add("--port", type=int, default=PORT, help="0 = any that is free")
    add("--api-key-file", type=Path, metavar="FILE", help=f"file that holds the API key; or set {KEY_VARIABLE}")
    add("--no-auth", action="store_true", help="whoever can connect may ask, at any address")
    add("--hosts", nargs="+", metavar="NAME", help="host names that requests may be addressed to; None = see --no-auth")
    add("--media", type=Path, metavar="FOLDER", help='images that "media:" and "file:" URLs may name; None = none may')
    for each in fields(Settings):
        if "help" in each.metadata:
            assert each.default is not MISSING
            option = f"--{each.name.replace('_', '-')}"
            add(option, type=type(each.default), default=each.default, help=each.metadata["help"])
    add_opening_options(parser)
    add_slot_options(parser)
    add("--log-level", choices=_LOG_LEVELS, default="warning", help="info: a line for each request, of its path alone")
    return parser.parse_args(arguments)


def settings_of(given: argparse.Namespace) -> Settings:
    """The settings that a command line asks for, with the key from its file or the environment. OptionError."""
    chosen = {each.name: getattr(given, each.name) for each in fields(Settings) if hasattr(given, each.name)}
    chosen["hosts"] = tuple(given.hosts) if given.hosts else None
    return Settings(**{**chosen, "api_key": read_api_key(given.api_key_file)})


def listen_at(host: str, port: int, settings: Settings) -> socket.socket:
    """A socket of that address, which nobody can connect to yet. OptionError when there is none to be had, and for an
    address that others can reach when they would need no key."""
    require_integer(port, f"--port {port}", 0, 65535)  # the system would take others modulo 65536
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise OptionError(
            f"--host {host!s:.100} --port {port}: {error}", expected="an address of this machine"
        ) from None
    if not ipaddress.ip_address(address[0]).is_loopback and settings.api_key is None and not settings.no_auth:
        raise OptionError(
            f"--host {host} can be reached from other machines, and no API key is asked for",
            expected=f"--api-key-file FILE, or {KEY_VARIABLE} in the environment",
            fix="openssl rand -hex 24 > key.txt, then --api-key-file key.txt; or --no-auth if everybody may ask",
        )
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError) as error:
        made.close()
        raise _not_here(f"--host {host} --port {port}", error) from None
    return made


def _not_here(where: str, error: Exception) -> OptionError:
    why = error.strerror if isinstance(error, OSError) else error
    return OptionError(f"{where}: {why}", fix="--port 0 takes one that is free")


def run(given: argparse.Namespace) -> int:
    """Serve until the process is asked to end; returns its exit status. Raises a FlexError."""
    logging.basicConfig(level=given.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    settings = settings_of(given)
    with listen_at(given.host, given.port, settings) as listener:
        opening = opening_options(given)
        with Engine(given.bundle, **opening) as engine:
            served = app(engine, settings)
            config = uvicorn.Config(
                served,
                http=_protocol(settings),
                ws="none",
                log_config=None,
                access_log=False,  # it would hold query strings
                proxy_headers=False,
                server_header=False,
                limit_concurrency=settings.connections,
                h11_max_incomplete_event_size=settings.header_bytes,
                timeout_keep_alive=max(1, round(settings.head_timeout)),
                timeout_graceful_shutdown=max(1, round(min(settings.read_timeout, settings.grace))),
            )
            server = _Server(config, served.state.service.worker, settings.grace, _url(listener, given.host))
            asyncio.run(server.serve(sockets=[listener]))
    if server.signal == signal.SIGINT:
        return command.INTERRUPTED
    return 0


def _url(listener: socket.socket, host: str) -> str:
    """What to open in a browser."""
    address, port = listener.getsockname()[:2]
    name = {"0.0.0.0": "localhost", "::": "localhost"}.get(address, host)
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


class _Server(uvicorn.Server):
    """Ends in order: asked to, it takes no more questions, and answers 503 to them, while those that came are answered;
    then it stops listening."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float, url: str) -> None:
        super().__init__(config)
        self._worker, self._grace, self._url = worker, grace, url
        self._loop: asyncio.AbstractEventLoop | None = None
        self.signal: int | None = None  # the first that asked

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As of uvicorn, and say so."""
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
        except OSError as error:  # two may have had the address while neither listened
            raise _not_here(self._url, error) from None
        print(f"{self._url} (Ctrl-C ends it)", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal asks the process to end. From the second on the system does it, at once."""
        signal.signal(sig, signal.SIG_DFL)
        if self.signal is not None or self._loop is None:
            signal.raise_signal(sig)
        self.signal = sig
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._worker.drain, self._grace)
        self.should_exit = True


def _protocol(settings: Settings) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 connection, with an end to what it would wait for without one: the headers of a request, the
    rest of a body that nobody reads, and a client that does not read what it is sent."""

    class Connection(H11Protocol):
        _unsent: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # pause_writing is called for whatever cannot be sent at once
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waits = self.cycle is None or self.cycle.response_complete
            if waits and self.timeout_keep_alive_task is None:
                self._expect_head()
            elif not waits and self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _expect_head(self) -> None:
            if self._unread is None:
                self._unread = self.loop.call_later(settings.head_timeout, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._unsent is None:
                self._unsent = self.loop.call_later(settings.read_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unsent is not None:
                self._unsent.cancel()
                self._unsent = None

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._unsent, self._unread):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

    return Connection


def main() -> int:
    """Entry of the command line; returns the exit status."""
    return command.run(lambda: run(parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
