"""Command line in, a served model out: `nnserver [PATH...]`; or `warm`, `token`, `umbridge`."""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import sys
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

from nncore.errors import NncoreError
from nnserver import __version__
from nnserver.config import Config, read_config, wants_check
from nnserver.errors import ConfigError
from nnserver.log_format import set_up_logging
from nnserver.memory import keep_freed_memory

if TYPE_CHECKING:
    from nnserver.app import App

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit status; or fill the cache of kernels."""
    argv = sys.argv[1:]
    try:
        if argv[:1] == ["warm"]:
            return _warm(argv[1:])
        if argv[:1] == ["token"]:
            return _token(argv[1:])
        if argv[:1] == ["umbridge"]:
            return _umbridge(argv[1:])
        if wants_check(argv):
            return _check(argv)
        config = read_config(argv, os.environ)
        _set_up_logging(config)
        return _serve(config, argv)
    except (ConfigError, NncoreError) as error:
        print(f"nnserver: error: {error}", file=sys.stderr)
        return 1


def _serve(config: Config, argv: list[str]) -> int:
    signals = _Signals()
    # Late, so that --help and a wrong setting answer at once.
    from nnserver.app import App

    keep_freed_memory()
    app = App(config)
    if signals.stop.is_set():
        return 0
    address = app.start()
    names = app.repository.names() or ["none"]
    metrics = f"metrics: http://{app.metrics_address}/metrics; " if app.metrics_address else ""
    print(
        f"nnserver {__version__} ready on {address}; models: {', '.join(names)}; {metrics}"
        f"try: nnclient models{_target_flag(address)}",
        flush=True,
    )
    # In a thread: a model that takes long to load keeps no drain waiting.
    reload = functools.partial(_reload_when_told, app, argv, signals.hang_ups)
    threading.Thread(target=reload, name="nnserver-hang-ups", daemon=True).start()
    signals.stop.wait()
    logger.info("draining")
    app.drain()
    logger.info("stopped")
    return 0


def _reload_when_told(app: App, argv: list[str], hang_ups: SimpleQueue[None]) -> None:
    """Read the configuration again at each hang-up; a broken one changes nothing."""
    while True:
        hang_ups.get()
        try:
            config = app.reload(read_config(argv, os.environ))
        except ConfigError as error:
            logger.error("configuration not reloaded, the one before stays in use: %s", error)
        except Exception:
            logger.exception("internal error while the configuration was reloaded")
        else:
            logging.getLogger().setLevel(config.log_level.upper())


def _check(argv: list[str]) -> int:
    from nnserver.check import check

    return check(argv, os.environ)


def _warm(argv: list[str]) -> int:
    from nnserver.warming import read_warm_config, warm

    config = read_warm_config(argv, os.environ)
    _set_up_logging(config)
    print(f"nnserver {__version__} {warm(config)}")
    return 0


def _umbridge(argv: list[str]) -> int:
    from nnserver.umbridge import run

    return run(argv)


def _token(argv: list[str]) -> int:
    from nnserver.token_command import run

    return run(argv)


class _Signals:
    """
    SIGTERM or SIGINT as an event, of which the second ends the process at once; SIGHUPs as a queue.

    Python runs a handler in the main thread, when that next runs bytecode; a signal that the kernel
    gives to another thread does not wake the main one from a lock. So handlers do nothing here: a thread
    reads the bytes that the interpreter writes for each signal, whichever thread it came to.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.hang_ups: SimpleQueue[None] = SimpleQueue()
        # Windows has none.
        self._hang_up: int | None = getattr(signal, "SIGHUP", None)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, self._hang_up):
            if number is not None:
                signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._watch, name="nnserver-signals", daemon=True).start()

    def _watch(self) -> None:
        while True:
            number = self._reader.recv(1)[0]
            if number == self._hang_up:
                self.hang_ups.put(None)
            elif self.stop.is_set():
                os._exit(128 + number)
            else:
                self.stop.set()


def _target_flag(address: str) -> str:
    return "" if address == Config().listen else f" --target {address}"


def _set_up_logging(config: Config) -> None:
    set_up_logging(config.log_level, config.log_format, has_access_log=config.access_log_sample > 0)


if __name__ == "__main__":
    sys.exit(main())
