"""Command line in, a served model out: `nnserver [PATH...]`; or `nnserver warm`, `nnserver token`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading

from nncore.errors import NncoreError
from nnserver import __version__
from nnserver.config import Config, read_config
from nnserver.errors import ConfigError
from nnserver.memory import keep_freed_memory

logger = logging.getLogger(__name__)


def main() -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit status; or fill the cache of kernels."""
    argv = sys.argv[1:]
    try:
        if argv[:1] == ["warm"]:
            return _warm(argv[1:])
        if argv[:1] == ["token"]:
            return _token(argv[1:])
        config = read_config(argv, os.environ)
        _set_up_logging(config)
        return _serve(config)
    except (ConfigError, NncoreError) as error:
        print(f"nnserver: error: {error}", file=sys.stderr)
        return 1


def _serve(config: Config) -> int:
    stop = _Stop()
    # Late, so that --help and a wrong setting answer at once.
    from nnserver.app import App

    keep_freed_memory()
    app = App(config)
    if stop.is_set():
        return 0
    address = app.start()
    names = app.repository.names() or ["none"]
    metrics = f"metrics: http://{app.metrics_address}/metrics; " if app.metrics_address else ""
    print(
        f"nnserver {__version__} ready on {address}; models: {', '.join(names)}; {metrics}"
        f"try: nnclient models{_target_flag(address)}",
        flush=True,
    )
    stop.wait()
    logger.info("draining grace_s=%g", config.grace_s)
    app.drain()
    logger.info("stopped")
    return 0


def _warm(argv: list[str]) -> int:
    from nnserver.warming import read_warm_config, warm

    config = read_warm_config(argv, os.environ)
    _set_up_logging(config)
    print(f"nnserver {__version__} {warm(config)}")
    return 0


def _token(argv: list[str]) -> int:
    from nnserver.token_command import run

    return run(argv)


class _Stop:
    """
    SIGTERM or SIGINT as an event; the second signal ends the process at once.

    Python runs a handler in the main thread, when that next runs bytecode; a signal that the kernel
    gives to another thread does not wake the main one from a lock. So handlers do nothing here: a thread
    reads the bytes that the interpreter writes for each signal, whichever thread it came to.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._watch, name="nnserver-signals", daemon=True).start()

    def _watch(self) -> None:
        self._reader.recv(1)
        self._event.set()
        number = self._reader.recv(1)[0]
        os._exit(128 + number)

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self) -> None:
        self._event.wait()


def _target_flag(address: str) -> str:
    return "" if address == Config().listen else f" --target {address}"


def _set_up_logging(config: Config) -> None:
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
