"""Arrays -> predictions over one gRPC channel: the synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Any, Literal, Self, overload

import grpc
from numpy.typing import ArrayLike, NDArray

from nnclient import health
from nnclient.conversation import AnyQuestion, Conversation, Result, answer_of, pieces_of
from nnclient.derivatives import DerivativeQuestion, Differential, OfOneOutput, OfOutputs, rows_of
from nnclient.differentiable import Differentiable
from nnclient.errors import InternalError, NnclientError, error_from_rpc
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
from nnclient.streaming import stream_results
from nnclient.wire import ANSWERS, OutputKind, Question, as_rows
from nnproto.v1 import inference_pb2 as pb


class Client(Differentiable):
    """
    A client of one server, for use with `with` or until close().

    May be used from any number of threads at once. A process that forks should make its clients
    after the fork: gRPC's threads do not survive one.

    target: HOST:PORT or unix:PATH.
    credentials: grpc.ChannelCredentials for TLS, such as grpc.ssl_channel_credentials(); None for none.
    token: who this client is, as `nnserver token` prints it. Without TLS it is sent to this machine only.
    allow_insecure_token: something else encrypts the way to the server: send the token there without TLS.
    metadata: pairs sent with every call, such as {"x-request-id": "…"}.
    timeout_s: time for each call that gives none itself, its retries included; None for no limit.
    message_bytes: the largest request message; larger arrays are split between rows and the answers joined.
    retry: what to do when the server is unavailable.
    keepalive_s: how long a call may be silent before the connection is probed; None for never.

    Raises InvalidInput for settings that cannot work. Making one does not connect yet.
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
        self._channel = self._options.open_channel(grpc)
        # Requests are bytes already: no serializer.
        self._unary = {
            name: self._channel.unary_unary(f"/{SERVICE}/{name}", response_deserializer=answer.FromString)
            for name, answer in ANSWERS.items()
        }
        self._streams = {
            name: self._channel.stream_stream(
                f"/{SERVICE}/{name}Stream", response_deserializer=answer.FromString
            )
            for name, answer in ANSWERS.items()
        }
        self._list_models = self._channel.unary_unary(
            f"/{SERVICE}/ListModels", response_deserializer=pb.ListModelsResponse.FromString
        )
        self._get_model = self._channel.unary_unary(
            f"/{SERVICE}/GetModel", response_deserializer=pb.Model.FromString
        )
        self._check_health = self._channel.unary_unary(health.CHECK_METHOD)
        # By model and version, as last heard: how many Jacobians fit into an answer.
        self._widths: dict[tuple[str, str], int] = {}

    @property
    def target(self) -> str:
        """The server's address, as given."""
        return self._options.target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight raise Cancelled. May be called again."""
        self._is_closed = True
        self._channel.close()

    @overload
    def predict(
        self,
        model: str,
        x: ArrayLike,
        output: Literal["outputs", "probabilities"] = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
    ) -> NDArray[Any]: ...
    @overload
    def predict(
        self,
        model: str,
        x: ArrayLike,
        output: Literal["labels"],
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
    ) -> Labels: ...
    @overload
    def predict(
        self,
        model: str,
        x: ArrayLike,
        output: OutputKind,
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
    ) -> NDArray[Any] | Labels: ...
    def predict(
        self,
        model: str,
        x: ArrayLike,
        output: OutputKind = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
    ) -> NDArray[Any] | Labels:
        """
        Return the model's answer for the rows of *x*.

        x: (rows, n_in), or (n_in,) for a single row. float32 and float64 are sent as they are; other
        real types as the smaller of the two that holds their values. The model computes in its own dtype.
        output: "outputs" or "probabilities": an array (rows, n_out) in the model's dtype; "labels": the
        top_k classes of each row as Labels. A single row is answered by a row: (n_out,) or (top_k,).
        version: empty for the server's choice.
        timeout_s: time for the whole call; None for the client's own.

        An array larger than message_bytes travels as a stream of messages, some of them at once.
        Raises InvalidInput, NotFound, Overloaded, DeadlineExceeded, Unavailable or another NnclientError.
        """
        question = Question(model, version, output, top_k)
        rows, single = as_rows(x)
        answer: Any = self._ask(question, rows, single, self._deadline(timeout_s))
        return answer  # type: ignore[no-any-return]

    def _differentiate(
        self,
        question: DerivativeQuestion,
        x: ArrayLike,
        directions: ArrayLike | None,
        choice: OfOutputs | OfOneOutput,
    ) -> Differential:
        question, rows, single = rows_of(question, x, directions)
        deadline = self._deadline(choice.get("timeout_s"))
        if question.kind == "jacobian" and len(rows) > 1:
            n_out = len(question.outputs) or self._width(question.model, question.version, deadline)
            question = question.with_answers_of(rows.shape[1], n_out)
        answer: Any = self._ask(question, rows, single, deadline)
        return answer  # type: ignore[no-any-return]

    def _width(self, model: str, version: str, deadline: Deadline) -> int:
        """Return the number of the model's outputs."""
        width = self._widths.get((model, version))
        if width is None:
            width = self.model(model, version, timeout_s=deadline.left_s()).n_out
            self._widths[model, version] = width
        return width

    def _ask(self, question: AnyQuestion, rows: NDArray[Any], single: bool, deadline: Deadline) -> Result:
        """Return the answer for one batch, in one message or as a stream of several."""
        ranges = pieces_of(question, rows, self._options.message_bytes)
        if len(ranges) == 1:
            response = self._call(self._unary[question.method], question.encode(rows), deadline)
            return answer_of(question, response, len(rows), single, self.target)
        (result,) = self._stream(question, [rows], max_in_flight=16, deadline=deadline)
        if isinstance(result, NnclientError):
            result.batch_index = None
            raise result
        return result

    @overload
    def stream(
        self,
        model: str,
        batches: Iterable[ArrayLike],
        output: Literal["outputs", "probabilities"] = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
        *,
        max_in_flight: int = 16,
        errors: Literal["raise"] = "raise",
    ) -> Generator[NDArray[Any], None, None]: ...
    @overload
    def stream(
        self,
        model: str,
        batches: Iterable[ArrayLike],
        output: Literal["labels"],
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
        *,
        max_in_flight: int = 16,
        errors: Literal["raise"] = "raise",
    ) -> Generator[Labels, None, None]: ...
    @overload
    def stream(
        self,
        model: str,
        batches: Iterable[ArrayLike],
        output: OutputKind = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
        *,
        max_in_flight: int = 16,
        errors: Literal["raise", "return"] = "raise",
    ) -> Generator[Any, None, None]: ...
    def stream(
        self,
        model: str,
        batches: Iterable[ArrayLike],
        output: OutputKind = "outputs",
        top_k: int = 1,
        version: str = "",
        timeout_s: float | None = None,
        *,
        max_in_flight: int = 16,
        errors: Literal["raise", "return"] = "raise",
    ) -> Generator[Any, None, None]:
        """
        Yield the model's answer for each of *batches*, in their order, while they are still being produced.

        batches: any iterable of arrays as for predict. It is iterated over in another thread, never
        further ahead than max_in_flight. What it raises is raised here, after the results before it.
        timeout_s: time for the whole stream; None for no limit.
        max_in_flight: messages sent and not answered at most.
        errors: "raise": a batch that fails raises, with its batch_index, and ends the stream.
        "return": its exception is yielded in its place, and the stream goes on.

        When the connection is lost, what is unanswered is sent again over a new one, as retry says.
        Closing the generator cancels the call and stops the use of *batches*; so does garbage collection.
        """
        question = Question(model, version, output, top_k)
        check_errors(errors)
        check_timeout(timeout_s)
        results = self._stream(question, batches, max_in_flight=max_in_flight, deadline=Deadline(timeout_s))
        return results if errors == "return" else _raise_errors(results)

    def models(self, timeout_s: float | None = None) -> list[ModelInfo]:
        """Return all models being served, sorted by name and version."""
        request = pb.ListModelsRequest().SerializeToString()
        response = self._call(self._list_models, request, self._deadline(timeout_s))
        return [self._decode_model(message) for message in response.models]

    def model(self, name: str, version: str = "", timeout_s: float | None = None) -> ModelInfo:
        """Return one model. Raises NotFound."""
        request = pb.GetModelRequest(name=name, version=version).SerializeToString()
        return self._decode_model(self._call(self._get_model, request, self._deadline(timeout_s)))

    def wait_ready(self, timeout_s: float = 30.0, model: str | None = None, version: str = "") -> None:
        """
        Return when the server says that it is serving, and *model* with it, if given.

        Raises DeadlineExceeded with what it was waiting for, and at once what no waiting can mend: NotFound
        if the server is ready and has no such model, Unauthenticated and the like.
        """
        patience = Patience(self.target, timeout_s)
        while True:
            try:
                self._probe(patience, model, version)
                return
            except WORTH_WAITING as error:
                time.sleep(patience.pause_s(error))

    def _probe(self, patience: Patience, model: str | None, version: str) -> None:
        response = self._call(self._check_health, health.CHECK_REQUEST, Deadline(patience.try_s()))
        health.raise_unless_serving(response, self.target)
        if model is not None:
            self.model(model, version, timeout_s=patience.try_s())

    def _deadline(self, timeout_s: float | None) -> Deadline:
        check_timeout(timeout_s)
        return Deadline(self._options.timeout_s if timeout_s is None else timeout_s)

    def _call(self, method: Callable[..., Any], request: bytes, deadline: Deadline) -> Any:
        self._check_open()
        failures = 0
        while True:
            try:
                return method(request, timeout=deadline.left_s(), metadata=self._options.metadata)
            except grpc.RpcError as rpc_error:
                error = error_from_rpc(rpc_error, target=self.target, timeout_s=deadline.timeout_s)
                failures += 1
                pause_s = self._options.retry.pause_before_retry(error, failures, deadline, is_stream=False)
                if pause_s is None:
                    raise error from rpc_error
                time.sleep(pause_s)

    def _stream(
        self, question: AnyQuestion, batches: Iterable[ArrayLike], *, max_in_flight: int, deadline: Deadline
    ) -> Generator[Result | NnclientError, None, None]:
        self._check_open()
        options, open_stream = self._options, self._streams[question.method]
        return stream_results(
            lambda requests, timeout_s: open_stream(requests, timeout=timeout_s, metadata=options.metadata),
            Conversation(question, options.message_bytes, options.target, max_in_flight),
            batches,
            deadline=deadline,
            retry=options.retry,
        )

    def _decode_model(self, message: pb.Model) -> ModelInfo:
        try:
            return decode_model(message)
        except ValueError as error:
            raise InternalError(f"the server at {self.target} sent a {error}") from None

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("this client has been closed")


def _raise_errors(results: Generator[Result | NnclientError, None, None]) -> Generator[Result, None, None]:
    try:
        for result in results:
            if isinstance(result, NnclientError):
                raise result
            yield result
    finally:
        results.close()
