"""
Request bytes -> what is asked for and the rows, without parsing, for requests like earlier ones.

Clients send the same request again and again, but for its rows and its id. Of a request that was
parsed and checked, *Templates* remembers the bytes between those two. A message of the same length with the
same bytes in the same places says the same thing: in protobuf's format, what precedes a field's content
decides where it ends. So such a message needs no parsing and no checks: 0.4 us instead of 5.

    | before: model, version, id's tag and length | id | between: kind, shape, dtype, ... | rows |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nnproto.v1 import inference_pb2 as pb
from nnserver.access_log import RequestFacts
from nnserver.api import wire
from nnserver.api.answers import Encoder
from nnserver.batcher import Job, Rows, Settler, Watcher, fail
from nnserver.repository import Repository, ServedModel

# Templates of one length, and lengths: enough for a server's models and a client's batch sizes.
_MOST_ALIKE = 8
_MOST_LENGTHS = 4096
# Bytes of a template: names, tags and shapes take tens. A client may put more between, such as fields that
# nobody knows; kept for every length, those would be all of the server's memory.
_MOST_COMPARED_BYTES = 1024
# Rows below this size are copied out of their message: cheaper than a view of it.
_COPIED_BYTES = 4096

_ID = pb.PredictRequest.ID_FIELD_NUMBER
_INPUTS = pb.PredictRequest.INPUTS_FIELD_NUMBER
_DATA = pb.Tensor.DATA_FIELD_NUMBER


class Kind:
    """How a request came, as metrics and logs call it."""

    PREDICT = "predict"
    PREDICT_STREAM = "predict_stream"
    DIFFERENTIATE = "differentiate"
    DIFFERENTIATE_STREAM = "differentiate_stream"
    INFER = "infer"
    INFER_STREAM = "infer_stream"


class Form:
    """
    What is asked for: which model, how many rows, and how the outputs are put into words.

    Answers carry the id of their request as `Job.note`: the whole field, which has the same number in both.
    """

    __slots__ = ("_encode", "kind", "model", "nbytes", "rows")

    # For those of requests that are observed: see observation.py.
    watcher: Watcher | None = None

    def __init__(self, kind: str, model: ServedModel, rows: int, nbytes: int, encode: Encoder) -> None:
        """
        kind: how the requests came, see `Kind`.  nbytes: of the rows in the model's dtype.
        """
        self.kind = kind
        self.model = model
        self.rows = rows
        self.nbytes = nbytes
        self._encode = encode

    def facts(self, job: Job) -> RequestFacts:
        """Return what a log may say of *job*."""
        note = job.note
        own_id = "".join(
            note[field.content : field.end].decode(errors="replace")
            for field in wire.fields(note, 0, len(note))
        )
        return RequestFacts(self.kind, self.model.name, self.model.version, self.rows, own_id)

    def deliver(self, jobs: Sequence[Job], y: Any) -> int:
        """Answer *jobs* with their parts of y, which has len(jobs) * rows rows."""
        unanswered = 0
        settlers: dict[Settler, None] = {}
        for job, answer in zip(jobs, self._encode(y, [job.note for job in jobs]), strict=True):
            try:
                settler = job.caller.answer(answer)
            except Exception as error:
                unanswered += 1
                fail(job, error)
            else:
                if settler is not None:
                    settlers[settler] = None
        for settler in settlers:
            settler.settle()
        return unanswered


# What a request says: what it asks for, its rows in the model's dtype, and the field of its id. No class of
# its own: making an object would cost as much as all the rest.
Known = tuple[Form, Rows, bytes]


# Where in a request its id is, if it has one, and where its rows are; None if they cannot be told apart from
# the rest. The rows' content must end the message, and neither may be in it twice.
Location = tuple[wire.Field | None, wire.Field]
Locate = Callable[[bytes], Location | None]


class _Template(NamedTuple):
    """What messages of one form are made of, but for id and rows; see the module's docstring."""

    before: bytes
    id_start: int
    id_end: int
    between: bytes
    rows_start: int
    form: Form


def locate(message: bytes) -> Location | None:
    """Return where a PredictRequest's id and rows are."""
    try:
        top = list(wire.fields(message, 0, len(message)))
        # Only what is known to be a tensor is looked into: an id of any bytes may come last.
        if top[-1].number != _INPUTS or not top[-1].is_bytes:
            return None
        inner = list(wire.fields(message, top[-1].content, top[-1].end))
    except ValueError:
        return None
    ids = [field for field in top if field.number == _ID]
    if len(ids) > 1 or not inner or inner[-1].number != _DATA or not all(field.is_bytes for field in ids):
        return None
    if [field.number for field in inner].count(_DATA) > 1:
        return None
    if [field.number for field in top].count(_INPUTS) > 1:
        return None
    return (ids[0] if ids else None), inner[-1]


class Templates:
    """
    What was learned of requests for the models of *repository*. Methods may be called from any thread.

    locate: finds id and rows in a request of the service.
    """

    def __init__(self, repository: Repository, locate: Locate = locate) -> None:
        self._repository = repository
        self._locate = locate
        self._by_length: dict[int, list[_Template]] = {}
        repository.watch(self.forget)

    def forget(self) -> None:
        """Recognise nothing, until it is learned again: forms hold models, which may be gone."""
        self._by_length = {}

    def find(self, message: bytes) -> Known | None:
        """Return what *message* says if one like it was learned."""
        for before, id_start, id_end, between, rows_start, form in self._by_length.get(len(message), ()):
            if message.startswith(between, id_end) and message.startswith(before):
                id_field = message[id_start:id_end] if id_end else b""
                if not id_field.isascii():
                    return None  # Not ours to say whether it is UTF-8.
                if len(message) < _COPIED_BYTES:
                    return form, message[rows_start:], id_field
                return form, memoryview(message)[rows_start:], id_field
        return None

    def learn(self, message: bytes, form: Form, generation: int) -> None:
        """
        Remember *message*, which was found to be of *form* when the repository was of *generation*.

        Only if all but its rows and its id can be compared: its rows come last, as the model takes them.
        """
        location = self._locate(message)
        if location is None:
            return
        of_id, data = location
        if data.end - data.content != form.nbytes:
            return
        # Tag and length of the id are compared, too: it has so many bytes in every message of the template.
        id_start, id_content, id_end = (of_id.start, of_id.content, of_id.end) if of_id else (0, 0, 0)
        if id_content + data.content - id_end > _MOST_COMPARED_BYTES:
            return
        template = _Template(
            message[:id_content],
            id_start,
            id_end,
            message[id_end : data.content],
            data.content,
            form,
        )
        if len(self._by_length) >= _MOST_LENGTHS:
            self._by_length = {}
        alike = self._by_length.get(len(message), [])
        self._by_length[len(message)] = [template, *alike][:_MOST_ALIKE]
        if self._repository.generation != generation:
            self.forget()  # The change may have come before the line above did.
