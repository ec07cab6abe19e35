"""An address in, a proxy to it out that counts what clients send."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def bytes_sent_to(address: str, run: Callable[[str], T]) -> tuple[int, T]:
    """Call *run* with the address of a proxy to *address*; return how many bytes it sent, and its result."""
    loop = asyncio.new_event_loop()
    proxy = _Proxy(address)
    port = loop.run_until_complete(proxy.listen())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        result = run(f"127.0.0.1:{port}")
    finally:
        asyncio.run_coroutine_threadsafe(proxy.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    return proxy.sent, result


class _Proxy:
    """Copies bytes between its clients and HOST:PORT; *sent*: those of the clients."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._tasks: set[asyncio.Task[None]] = set()
        self.sent = 0

    async def listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, counts: bool) -> None:
            while data := await source.read(1 << 16):
                self.sent += len(data) if counts else 0
                target.write(data)
                await target.drain()

        try:
            ways = (copy(reader, far_writer, True), copy(far_reader, writer, False))
            await asyncio.wait(map(asyncio.ensure_future, ways), return_when=asyncio.FIRST_COMPLETED)
        finally:
            writer.close()
            far_writer.close()
