"""Arrays -> predictions over one gRPC channel: the client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self, overload

import grpc
import grpc.aio
from numpy.typing import ArrayLike, NDArray

from nnclient import health
from nnclient.conversation import AnyQuestion, AnyResponse, Conversation, Result, answer_of, pieces_of
from nnclient.derivatives import DerivativeQuestion, Differential, OfOneOutput, OfOutputs, rows_of
from nnclient.differentiable import AsyncDifferentiable
from nnclient.errors import InternalError, NnclientError, Unavailable, error_from_rpc
from nnclient.labels import Labels
from nnclient.models import ModelInfo, decode_model
from nnclient.options import (
    DEFAULT_MESSAGE_BYTES,
    DEFAULT_TARGET,
    Metadata,
    Options,
    check_errors,
    check_timeout,
)
from nnclient.retry import SERVICE, WORTH_WAITING, Deadline, Patience, RetryPolicy
from nnclient.wire import ANSWERS, OutputKind, Question, as_rows
from nnproto.v1 import inference_pb2 as pb

# If a call ends while a request is being written, grpc.aio reports the write, as INTERNAL with this
# text, and no longer why the call has ended. A new call will tell, if that was more than a lost connection.
_FAILED_WRITE = "Internal error from Core"

Batches = Iterable[ArrayLike] | AsyncIterable[ArrayLike]


class AsyncClient(AsyncDifferentiable):
    """
    Client, for asyncio: the same calls with `await`, settings and exceptions as there.

    For use with `async with`, or until `await close()`, in one event loop. Any number of tasks may
    use it at once. Cancelling a task cancels its call.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        allow_insecure_token: bool = False,
        metadata: Metadata = (),
        timeout_s: float | None = 60.0,
        message_bytes: int = DEFAULT_MESSAGE_BYTES,
        retry: RetryPolicy | None = None,
        keepalive_s: float | None = 330.0,
    ) -> None:
        self._options = Options.make(
            target=target,
            credentials=credentials,
            token=token,
            allow_insecure_token=allow_insecure_token,
            metadata=metadata,
            timeout_s=timeout_s,
            message_bytes=message_bytes,
            retry=retry or RetryPolicy(),
            keepalive_s=keepalive_s,
        )
        self._is_closed = False
        self._opened: _Methods | None = None
        # By model and version, as last heard: how many Jacobians fit into an answer.
        self._widths: dict[tuple[str, str], int] = {}

    @property
    def target(self) -> str:
        """The server's address, as given."""
        return self._options.target

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight raise Cancelled. May be called again."""
        self._is_closed = True
        if self._opened is not None:
            await self._opened.channel.close()

    @overload
    async def predict(
        self,
        model: str,
        x: ArrayLike,
        output: Literal["outputs", "probabilities"] = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
    ) -> NDArray[Any]: ...
    @overload
    async def predict(
        self,
        model: str,
        x: ArrayLike,
        output: Literal["labels"],
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
    ) -> Labels: ...
    @overload
    async def predict(
        self,
        model: str,
        x: ArrayLike,
        output: OutputKind,
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
    ) -> NDArray[Any] | Labels: ...
    async def predict(
        self,
        model: str,
        x: ArrayLike,
        output: OutputKind = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
    ) -> NDArray[Any] | Labels:
        """Return the model's answer for the rows of *x*, as Client.predict does."""
        question = Question(model, version, output, top_k)
        rows, single = as_rows(x)
        answer: Any = await self._ask(question, rows, single, self._deadline(timeout_s))
        return answer  # type: ignore[no-any-return]

    async def _differentiate(
        self,
        question: DerivativeQuestion,
        x: ArrayLike,
        directions: ArrayLike | None,
        choice: OfOutputs | OfOneOutput,
    ) -> Differential:
        question, rows, single = rows_of(question, x, directions)
        deadline = self._deadline(choice.get("timeout_s"))
        if question.kind == "jacobian" and len(rows) > 1:
            n_out = len(question.outputs) or await self._width(question.model, question.version, deadline)
            question = question.with_answers_of(rows.shape[1], n_out)
        answer: Any = await self._ask(question, rows, single, deadline)
        return answer  # type: ignore[no-any-return]

    async def _width(self, model: str, version: str, deadline: Deadline) -> int:
        """Return the number of the model's outputs."""
        width = self._widths.get((model, version))
        if width is None:
            width = (await self.model(model, version, timeout_s=deadline.left_s())).n_out
            self._widths[model, version] = width
        return width

    async def _ask(
        self, question: AnyQuestion, rows: NDArray[Any], single: bool, deadline: Deadline
    ) -> Result:
        """Return the answer for one batch, in one message or as a stream of several."""
        ranges = pieces_of(question, rows, self._options.message_bytes)
        if len(ranges) == 1:
            method = self._methods().unary[question.method]
            response = await self._call(method, question.encode(rows), deadline)
            return answer_of(question, response, len(rows), single, self.target)
        results = self._stream(question, [rows], max_in_flight=16, deadline=deadline)
        (result,) = [result async for result in results]
        if isinstance(result, NnclientError):
            result.batch_index = None
            raise result
        return result

    @overload
    def stream(
        self,
        model: str,
        batches: Batches,
        output: Literal["outputs", "probabilities"] = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
        *,
        max_in_flight: int = 16,
        errors: Literal["raise"] = "raise",
    ) -> AsyncGenerator[NDArray[Any], None]: ...
    @overload
    def stream(
        self,
        model: str,
        batches: Batches,
        output: Literal["labels"],
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
        *,
        max_in_flight: int = 16,
        errors: Literal["raise"] = "raise",
    ) -> AsyncGenerator[Labels, None]: ...
    @overload
    def stream(
        self,
        model: str,
        batches: Batches,
        output: OutputKind = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
        *,
        max_in_flight: int = 16,
        errors: Literal["raise", "return"] = "raise",
    ) -> AsyncGenerator[Any, None]: ...
    def stream(
        self,
        model: str,
        batches: Batches,
        output: OutputKind = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
        *,
        max_in_flight: int = 16,
        errors: Literal["raise", "return"] = "raise",
    ) -> AsyncGenerator[Any, None]:
        """
        Yield the model's answer for each of *batches*, as Client.stream does.

        batches: an iterable or an asynchronous iterable of arrays. A plain one is iterated over in the
        event loop, which it must not block.

        `async with contextlib.aclosing(client.stream(...)) as results:` cancels the call as soon as the
        block is left; without it, an abandoned generator is closed when the event loop gets to it.
        """
        question = Question(model, version, output, top_k)
        check_errors(errors)
        check_timeout(timeout_s)
        results = self._stream(question, batches, max_in_flight=max_in_flight, deadline=Deadline(timeout_s))
        return results if errors == "return" else _raise_errors(results)

    async def models(self, timeout_s: float | None = None) -> list[ModelInfo]:
        """Return all models being served, sorted by name and version."""
        request = pb.ListModelsRequest().SerializeToString()
        response = await self._call(self._methods().list_models, request, self._deadline(timeout_s))
        return [self._decode_model(message) for message in response.models]

    async def model(self, name: str, version: str = "", timeout_s: float | None = None) -> ModelInfo:
        """Return one model. Raises NotFound."""
        request = pb.GetModelRequest(name=name, version=version).SerializeToString()
        return self._decode_model(
            await self._call(self._methods().get_model, request, self._deadline(timeout_s))
        )

    async def wait_ready(self, timeout_s: float = 30.0, model: str | None = None, version: str = "") -> None:
        """Return when the server is serving, and *model* with it, as Client.wait_ready does."""
        patience = Patience(self.target, timeout_s)
        while True:
            try:
                await self._probe(patience, model, version)
                return
            except WORTH_WAITING as error:
                await asyncio.sleep(patience.pause_s(error))

    async def _probe(self, patience: Patience, model: str | None, version: str) -> None:
        response = await self._call(
            self._methods().check_health, health.CHECK_REQUEST, Deadline(patience.try_s())
        )
        health.raise_unless_serving(response, self.target)
        if model is not None:
            await self.model(model, version, timeout_s=patience.try_s())

    def _deadline(self, timeout_s: float | None) -> Deadline:
        check_timeout(timeout_s)
        return Deadline(self._options.timeout_s if timeout_s is None else timeout_s)

    def _methods(self) -> _Methods:
        if self._is_closed:
            raise RuntimeError("this client has been closed")
        if self._opened is None:
            # Not when the client is made: an asyncio channel belongs to the event loop that runs then.
            self._opened = _Methods(self._options.open_channel(grpc.aio))
        return self._opened

    async def _call(self, method: Callable[..., Any], request: bytes, deadline: Deadline) -> Any:
        failures = 0
        while True:
            try:
                return await method(request, timeout=deadline.left_s(), metadata=self._options.metadata)
            except grpc.RpcError as rpc_error:
                error = error_from_rpc(rpc_error, target=self.target, timeout_s=deadline.timeout_s)
                failures += 1
                pause_s = self._options.retry.pause_before_retry(error, failures, deadline, is_stream=False)
                if pause_s is None:
                    raise error from rpc_error
                await asyncio.sleep(pause_s)

    def _stream(
        self, question: AnyQuestion, batches: Batches, *, max_in_flight: int, deadline: Deadline
    ) -> AsyncGenerator[Result | NnclientError, None]:
        open_stream, options = self._methods().streams[question.method], self._options
        return _stream_results(
            lambda: open_stream(timeout=deadline.left_s(), metadata=options.metadata),
            Conversation(question, options.message_bytes, options.target, max_in_flight),
            _as_async(batches),
            deadline=deadline,
            retry=options.retry,
        )

    def _decode_model(self, message: pb.Model) -> ModelInfo:
        try:
            return decode_model(message)
        except ValueError as error:
            raise InternalError(f"the server at {self.target} sent a {error}") from None


class _Methods:
    """A channel and the methods called over it."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        # Requests are bytes already: no serializer.
        self.unary = {
            name: channel.unary_unary(f"/{SERVICE}/{name}", response_deserializer=answer.FromString)
            for name, answer in ANSWERS.items()
        }
        self.streams = {
            name: channel.stream_stream(f"/{SERVICE}/{name}Stream", response_deserializer=answer.FromString)
            for name, answer in ANSWERS.items()
        }
        self.list_models = channel.unary_unary(
            f"/{SERVICE}/ListModels", response_deserializer=pb.ListModelsResponse.FromString
        )
        self.get_model = channel.unary_unary(
            f"/{SERVICE}/GetModel", response_deserializer=pb.Model.FromString
        )
        self.check_health = channel.unary_unary(health.CHECK_METHOD)


async def _stream_results(
    open_call: Callable[[], Any],
    conversation: Conversation,
    batches: AsyncIterator[ArrayLike],
    *,
    deadline: Deadline,
    retry: RetryPolicy,
) -> AsyncGenerator[Result | NnclientError, None]:
    """Yield the result of each batch, or the error of that batch alone; see streaming.stream_results."""
    shared = _Shared(conversation)
    failures = 0
    call = open_call()
    # The input has a task of its own, which outlives lost connections: cancelling what waits for
    # an asynchronous generator ends that generator.
    puller = asyncio.create_task(shared.pull(batches))
    sender = shared.start_sending(call)
    try:
        while True:
            await shared.wait_for(shared.has_work_for_reader)
            if conversation.is_finished:
                break
            if conversation.has_result:
                yield shared.pop_result()
                continue
            try:
                shared.receive(await _read(call, conversation.target, deadline))
                failures = 0
            except NnclientError as error:
                failures += 1
                pause_s = retry.pause_before_retry(error, failures, deadline, is_stream=True)
                if pause_s is None:
                    if not shared.give_up(error):
                        raise
                    failures = 0
                    continue
                call.cancel()
                await _end(sender)
                await asyncio.sleep(pause_s)
                shared.rewind()
                call = open_call()
                sender = shared.start_sending(call)
        conversation.raise_input_error()
        # Let the server end the call: cancelling it now would look like a client gone.
        with contextlib.suppress(grpc.RpcError):
            await call.read()
    finally:
        call.cancel()
        await _end(puller)
        await _end(sender)


async def _read(call: Any, target: str, deadline: Deadline) -> AnyResponse:
    try:
        response: Any = await call.read()
    except grpc.RpcError as error:
        if error.details() == _FAILED_WRITE:
            raise Unavailable(
                f"the connection to {target} was lost; the server may have stopped or restarted",
                status="UNAVAILABLE",
            ) from error
        raise error_from_rpc(error, target=target, timeout_s=deadline.timeout_s) from error
    if response is grpc.aio.EOF:
        raise InternalError(f"the server at {target} ended the stream before it had answered all")
    return response  # type: ignore[no-any-return]


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    # Not `await task`: a cancellation of this task and of that one could not be told apart.
    await asyncio.wait([task])


async def _raise_errors(
    results: AsyncGenerator[Result | NnclientError, None],
) -> AsyncGenerator[Result, None]:
    async with contextlib.aclosing(results):
        async for result in results:
            if isinstance(result, NnclientError):
                raise result
            yield result


def _as_async(batches: Batches) -> AsyncIterator[ArrayLike]:
    return aiter(batches) if isinstance(batches, AsyncIterable) else _AsyncIterator(iter(batches))


class _AsyncIterator(AsyncIterator[ArrayLike]):
    """A plain iterator, seen as an asynchronous one. Not a generator, which would have to be closed."""

    def __init__(self, iterator: Iterator[ArrayLike]) -> None:
        self._iterator = iterator

    async def __anext__(self) -> ArrayLike:
        try:
            return next(self._iterator)
        except StopIteration:
            raise StopAsyncIteration from None


class _Shared:
    """The conversation as its three tasks see it: one pulls input, one sends, one reads and yields."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._waiting: list[asyncio.Future[None]] = []
        self._sender: asyncio.Task[None] | None = None

    async def wait_for(self, holds: Callable[[Conversation], bool]) -> None:
        """Return when *holds* says so of the conversation."""
        while not holds(self._conversation):
            change = asyncio.get_running_loop().create_future()
            self._waiting.append(change)
            await change

    def _changed(self) -> None:
        for change in self._waiting:
            if not change.done():
                change.set_result(None)
        self._waiting.clear()

    async def pull(self, batches: AsyncIterator[ArrayLike]) -> None:
        """Take the input in, as far ahead as the conversation wants it."""
        while True:
            await self.wait_for(lambda talk: talk.wants_batch)
            try:
                batch = await anext(batches)
            except StopAsyncIteration:
                self._conversation.end_input()
            except BaseException as error:
                # Raised again by the reader, in its turn.
                self._conversation.end_input(error)
            else:
                self._conversation.add_batch(batch)
                self._changed()
                continue
            self._changed()
            return

    def start_sending(self, call: Any) -> asyncio.Task[None]:
        """Return a task that sends over *call* until nothing is left or it fails; its reader learns why."""
        self._sender = asyncio.create_task(self._send(call))
        self._sender.add_done_callback(lambda _: self._changed())
        return self._sender

    def has_work_for_reader(self, talk: Conversation) -> bool:
        """Whether there is something to read or to yield, or the end, or a call that no one sends over."""
        is_unsent = self._sender is not None and self._sender.done() and talk.has_request
        return talk.has_result or talk.in_flight > 0 or talk.is_finished or is_unsent

    async def _send(self, call: Any) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                await self.wait_for(lambda talk: talk.has_request or talk.is_sent)
                request = self._conversation.next_request()
                if request is None:
                    await call.done_writing()
                    return
                self._changed()
                await call.write(request)

    def receive(self, response: AnyResponse) -> None:
        self._conversation.receive(response)
        self._changed()

    def give_up(self, error: NnclientError) -> bool:
        self._changed()
        return self._conversation.give_up(error)

    def pop_result(self) -> Result | NnclientError:
        result = self._conversation.pop_result()
        self._changed()
        return result

    def rewind(self) -> None:
        self._conversation.rewind()
        self._changed()
