"""
Batches -> results in order, over a bidirectional call of the synchronous API.

Three parties share a Conversation under one lock: the thread in which gRPC sends (it also iterates
over the input, so that a slow input never delays results), the caller's thread, which reads answers
as it asks for results, and, after a lost connection, the sending thread of the call before, which may
still be waiting for the input and hands what it gets to its successor.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from threading import Condition
from typing import Any

import grpc
from numpy.typing import ArrayLike

from nnclient.conversation import AnyResponse, Conversation, Result
from nnclient.errors import InternalError, NnclientError, error_from_rpc
from nnclient.retry import Deadline, RetryPolicy

# Starts a call: (iterator of request bytes, seconds it may take) -> a grpc call to iterate over.
OpenCall = Callable[[Iterator[bytes], float | None], Any]


def stream_results(
    open_call: OpenCall,
    conversation: Conversation,
    batches: Iterable[ArrayLike],
    *,
    deadline: Deadline,
    retry: RetryPolicy,
) -> Generator[Result | NnclientError, None, None]:
    """
    Yield the result of each batch, or the error of that batch alone, in order.

    Raises an NnclientError if the call itself fails for good, and what *batches* raises, each after
    the results of the batches before. Closing the generator cancels the call and stops the input.
    """
    shared = _Shared(conversation, iter(batches))
    failures = 0
    call = shared.start(open_call, deadline)
    try:
        while shared.wait_for_answer_or_result():
            if conversation.has_result:
                yield shared.pop_result()
                continue
            try:
                shared.receive(_read(call, conversation.target, deadline))
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
                time.sleep(pause_s)
                call = shared.start(open_call, deadline)
        conversation.raise_input_error()
        _read_end(call)
    finally:
        # In this order: the end of the requests would tell the server that all is well.
        call.cancel()
        shared.close()


def _read(call: Any, target: str, deadline: Deadline) -> AnyResponse:
    try:
        response: AnyResponse = next(call)
    except StopIteration:
        raise InternalError(f"the server at {target} ended the stream before it had answered all") from None
    except grpc.RpcError as error:
        raise error_from_rpc(error, target=target, timeout_s=deadline.timeout_s) from error
    return response


def _read_end(call: Any) -> None:
    # Let the server end the call: cancelling it now would look like a client gone. Every answer is
    # here, so that how it ends does not matter any more.
    with contextlib.suppress(grpc.RpcError):
        next(call, None)


class _Shared:
    """The conversation and its input, with the lock around them."""

    def __init__(self, conversation: Conversation, batches: Iterator[ArrayLike]) -> None:
        self._conversation = conversation
        self._batches = batches
        self._changed = Condition()
        self._sender: _Sender | None = None
        # An iterator may be advanced by one thread at a time.
        self._is_pulling = False
        self._call_has_ended = False

    def start(self, open_call: OpenCall, deadline: Deadline) -> Any:
        """Return a new call, over which all that is unanswered is sent; the one before gets nothing more."""
        with self._changed:
            self._conversation.rewind()
            self._sender = sender = _Sender(self)
            self._call_has_ended = False
            self._changed.notify_all()
        call = open_call(sender, deadline.left_s())
        # The thread in which gRPC sends may end with its call, and leave no one to ask for requests.
        if not call.add_callback(lambda: self._note_end(sender)):
            self._note_end(sender)
        return call

    def _note_end(self, sender: _Sender) -> None:
        with self._changed:
            if self._sender is sender:
                self._call_has_ended = True
                self._changed.notify_all()

    def close(self) -> None:
        """End the request iterator, and with it the use of the input."""
        with self._changed:
            self._sender = None
            self._changed.notify_all()

    def wait_for_answer_or_result(self) -> bool:
        """Wait until there is something to read or to yield; return False if there never will be."""
        talk = self._conversation
        with self._changed:
            self._changed.wait_for(
                lambda: talk.has_result or talk.in_flight or talk.is_finished or self._needs_new_call()
            )
            return not talk.is_finished

    def _needs_new_call(self) -> bool:
        # While the input is being waited for, a call that has ended does no harm.
        return self._call_has_ended and (self._conversation.has_request or not self._is_pulling)

    def receive(self, response: AnyResponse) -> None:
        with self._changed:
            self._conversation.receive(response)
            self._changed.notify_all()

    def give_up(self, error: NnclientError) -> bool:
        with self._changed:
            self._changed.notify_all()
            return self._conversation.give_up(error)

    def pop_result(self) -> Result | NnclientError:
        with self._changed:
            result = self._conversation.pop_result()
            self._changed.notify_all()
            return result

    def next_request(self, sender: _Sender) -> bytes | None:
        """Return the next request for *sender*, waiting for room and for input; None to end its call."""
        talk = self._conversation
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._sender is not sender
                        or talk.has_request
                        or talk.is_sent
                        or (talk.wants_batch and not self._is_pulling)
                    )
                )
                if self._sender is not sender:
                    return None
                request = talk.next_request()
                if request is not None:
                    self._changed.notify_all()
                    return request
                if talk.is_sent:
                    return None
                self._is_pulling = True
            self._pull()

    def _pull(self) -> None:
        # Outside of the lock: the input may take its time.
        batch, error, ended = None, None, False
        try:
            batch = next(self._batches)
        except StopIteration:
            ended = True
        except BaseException as raised:
            # Raised again in the caller's thread, in its turn.
            error, ended = raised, True
        with self._changed:
            self._is_pulling = False
            if ended:
                self._conversation.end_input(error)
            else:
                self._conversation.add_batch(batch)  # type: ignore[arg-type]
            self._changed.notify_all()


class _Sender(Iterator[bytes]):
    """The requests of one call, as gRPC's sending thread iterates over them."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    def __next__(self) -> bytes:
        request = self._shared.next_request(self)
        if request is None:
            raise StopIteration
        return request
