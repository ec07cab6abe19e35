"""Requests that are wrong in shape, payload, names or parameters -> a status, and a text that says why."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from support.oip import request_for as oip_request_for
from support.oip import tensor_of
from support.random_models import same_bits
from support.server import PREDICT, PREDICT_STREAM, ServerProcess, request, rows

from faults.bystander import DIGITS, PATIENCE_S, Bystander, X
from faults.tried import Tried, tried
from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as own

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
INVALID, NOT_FOUND, EXHAUSTED = "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"
# A text is a header: clients give up a call with much more than 8 KiB of them.
MOST_TEXT = 1500


def of_shape(*shape: int, **fields: Any) -> own.PredictRequest:
    """A request that claims *shape*, with one row of data."""
    message = request(X[:1], **fields)
    message.inputs.shape[:] = shape
    return message


def of_oip_shape(*shape: int) -> oip.ModelInferRequest:
    message = oip_request_for(X[:1], "digits")
    message.inputs[0].shape[:] = shape
    return message


def of_dtype(dtype: Any) -> own.PredictRequest:
    """A request with float32 rows that claims another dtype."""
    message = request(X[:1])
    message.inputs.dtype = dtype
    return message


def with_data(data: bytes, **fields: Any) -> own.PredictRequest:
    message = request(X[:1], **fields)
    message.inputs.data = data
    return message


def changed(change: Callable[[oip.ModelInferRequest], Any], raw: bool = True) -> oip.ModelInferRequest:
    """A request for one row, with *change* made to it."""
    message = oip_request_for(X[:1], "digits", raw=raw)
    change(message)
    return message


def set_parameter(name: str, **choice: Any) -> Callable[[Any], None]:
    """Set a parameter of a request, or of one of its tensors."""

    def change(of: Any) -> None:
        of.parameters[name].SetInParent()
        for kind, value in choice.items():
            setattr(of.parameters[name], kind, value)

    return change


def asking_for(*names: str, **parameters: dict[str, Any]) -> oip.ModelInferRequest:
    message = oip_request_for(X[:1], "digits", outputs=names)
    for name, choice in parameters.items():
        set_parameter(name, **choice)(message.outputs[0])
    return message


def lying(message: bytes, more: int) -> bytes:
    """*message*, whose last field claims *more* bytes than follow: cut at its end instead."""
    return message[:-more]


@dataclass(frozen=True, slots=True)
class Attack:
    """One wrong request: what it must be answered with, and how the text begins or what it contains."""

    section: str
    what: str
    message: Any
    status: str
    text: str

    @property
    def service(self) -> str:
        return "oip" if isinstance(self.message, oip.ModelInferRequest) else "own"

    def bytes(self) -> bytes:
        found: bytes = self.message if isinstance(self.message, bytes) else self.message.SerializeToString()
        return found


MEGABYTE = "x" * (1 << 20)

ATTACKS = [
    # Shapes.
    Attack(
        "Shapes", "no shape", of_shape(), INVALID, "inputs has shape (); model 'digits' expects (rows, 64)"
    ),
    Attack("Shapes", "no shape (OIP)", of_oip_shape(), INVALID, "inputs has shape ()"),
    Attack("Shapes", "a dimension too many", of_shape(1, 8, 8), INVALID, "inputs has shape (1, 8, 8)"),
    Attack(
        "Shapes", "a dimension too many (OIP)", of_oip_shape(1, 64, 1), INVALID, "inputs has shape (1, 64, 1)"
    ),
    Attack(
        "Shapes", "a row too few", of_shape(0, 64), INVALID, "inputs has 256 bytes of data; shape (0, 64)"
    ),
    Attack("Shapes", "rows and columns exchanged", of_shape(64, 1), INVALID, "inputs has shape (64, 1)"),
    Attack("Shapes", "negative rows", of_shape(-1, 64), INVALID, "inputs has shape (-1, 64)"),
    Attack("Shapes", "negative rows (OIP)", of_oip_shape(-1, 64), INVALID, "inputs has shape (-1, 64)"),
    Attack("Shapes", "negative columns and rows", of_shape(-1, -64), INVALID, "inputs has shape (-1, -64)"),
    Attack("Shapes", "2^58 rows: 64 bits overflow", of_shape(2**58, 64), INVALID, "inputs has 256 bytes"),
    Attack(
        "Shapes", "2^58 rows (OIP)", of_oip_shape(2**58, 64), INVALID, "inputs has 256 bytes of raw contents"
    ),
    Attack("Shapes", "2^63 - 1 rows", of_shape(2**63 - 1, 64), INVALID, "inputs has 256 bytes"),
    Attack(
        "Shapes",
        "rank 1,000",
        of_shape(*range(1000)),
        INVALID,
        "inputs has shape (0, 1, 2, 3, 4, 5, 6, 7, ...: 1000 dim",
    ),
    Attack(
        "Shapes",
        "rank 1,000 (OIP)",
        of_oip_shape(*[1] * 1000),
        INVALID,
        "inputs has shape (1, 1, 1, 1, 1, 1, 1, 1, ...: 1000",
    ),
    Attack(
        "Shapes",
        "rank 100,000",
        of_shape(*[2**62] * 100_000),
        INVALID,
        "a shape takes 900000 bytes; expected one or two",
    ),
    # Payloads.
    Attack(
        "Payloads",
        "no data",
        with_data(b""),
        INVALID,
        "inputs has 0 bytes of data; shape (1, 64) of float32 takes 256",
    ),
    Attack("Payloads", "short data", with_data(bytes(252)), INVALID, "inputs has 252 bytes of data"),
    Attack("Payloads", "long data", with_data(bytes(260)), INVALID, "inputs has 260 bytes of data"),
    Attack(
        "Payloads",
        "data that is no multiple of 4",
        with_data(bytes(255)),
        INVALID,
        "inputs has 255 bytes of data",
    ),
    Attack("Payloads", "no dtype", of_dtype(0), INVALID, "inputs has dtype DATA_TYPE_UNSPECIFIED"),
    Attack("Payloads", "a dtype that is none", of_dtype(77), INVALID, "inputs has dtype 77"),
    Attack("Payloads", "float32 called float64", of_dtype(2), INVALID, "inputs has 256 bytes of data; shape"),
    Attack(
        "Payloads",
        "a length that lies",
        lying(request(X[:1]).SerializeToString(), 5),
        INVALID,
        "are not a nnproto.v1.PredictRequest",
    ),
    Attack(
        "Payloads",
        "100 KB beside one row",
        b"\x9a\x06\xa0\x8d\x06" + bytes(100_000) + request(X[:1]).SerializeToString(),
        INVALID,
        "the message has",
    ),
    Attack(
        "Payloads",
        "short raw contents (OIP)",
        changed(lambda m: m.raw_input_contents.__setitem__(0, bytes(10))),
        INVALID,
        "inputs has 10 bytes of raw contents",
    ),
    Attack(
        "Payloads",
        "two raw contents (OIP)",
        changed(lambda m: m.raw_input_contents.append(b"x")),
        INVALID,
        "raw_input_contents has 2 entries; expected 1",
    ),
    Attack(
        "Payloads",
        "100,000 raw contents (OIP)",
        changed(lambda m: m.raw_input_contents.extend([b""] * 100_000)),
        INVALID,
        "are more than 20000 fields",
    ),
    Attack(
        "Payloads",
        "raw and typed mixed (OIP)",
        changed(lambda m: m.inputs[0].contents.fp32_contents.append(1)),
        INVALID,
        "inputs has fp32_contents beside raw_input_contents",
    ),
    Attack(
        "Payloads",
        "two kinds of typed contents (OIP)",
        changed(lambda m: m.inputs[0].contents.int_contents.append(1), raw=False),
        INVALID,
        "inputs has int_contents and fp32_contents; expected fp32_contents alone",
    ),
    Attack(
        "Payloads",
        "typed contents too few (OIP)",
        changed(lambda m: m.inputs[0].contents.fp32_contents.pop(), raw=False),
        INVALID,
        "inputs has 63 elements in fp32_contents",
    ),
    Attack(
        "Payloads",
        "neither raw nor typed (OIP)",
        changed(lambda m: m.ClearField("raw_input_contents")),
        INVALID,
        "inputs has 0 elements in fp32_contents",
    ),
    Attack(
        "Payloads",
        "a datatype that is none (OIP)",
        changed(lambda m: setattr(m.inputs[0], "datatype", "FP33")),
        INVALID,
        "inputs has datatype 'FP33'; expected one of",
    ),
    Attack(
        "Payloads",
        "text for numbers (OIP)",
        changed(lambda m: setattr(m.inputs[0], "datatype", "BYTES")),
        INVALID,
        "inputs has datatype 'BYTES'; expected one of",
    ),
    Attack(
        "Payloads",
        "two inputs (OIP)",
        changed(lambda m: m.inputs.append(m.inputs[0])),
        INVALID,
        "the request has the inputs 'inputs', 'inputs'; model",
    ),
    Attack(
        "Payloads",
        "no input (OIP)",
        changed(lambda m: m.ClearField("inputs")),
        INVALID,
        "the request has no inputs",
    ),
    Attack(
        "Payloads",
        "an output asked for twice (OIP)",
        asking_for("outputs", "outputs"),
        INVALID,
        "output 'outputs' is asked for twice",
    ),
    Attack(
        "Payloads",
        "3,000 outputs (OIP)",
        asking_for(*[f"o{i}" for i in range(3000)]),
        INVALID,
        "model 'digits' has no output 'o0'",
    ),
    Attack(
        "Payloads",
        "100,000 outputs (OIP)",
        asking_for(*["outputs"] * 100_000),
        INVALID,
        "are more than 20000 fields",
    ),
    # Names.
    Attack(
        "Names", "no model", request(X[:1], ""), NOT_FOUND, "no model was named; this server has 'digits'"
    ),
    Attack("Names", "no model (OIP)", oip_request_for(X[:1], ""), NOT_FOUND, "no model was named"),
    Attack("Names", "a blank model", request(X[:1], " "), NOT_FOUND, "unknown model ' '; this server has"),
    Attack("Names", "a model called ..", request(X[:1], ".."), NOT_FOUND, "unknown model '..'"),
    Attack(
        "Names",
        "a path for a model",
        request(X[:1], "../../../etc/passwd"),
        NOT_FOUND,
        "unknown model '../../../etc/passwd'",
    ),
    Attack(
        "Names",
        "a path for a model (OIP)",
        oip_request_for(X[:1], "/etc/passwd"),
        NOT_FOUND,
        "unknown model '/etc/passwd'",
    ),
    Attack("Names", "NUL in a name", request(X[:1], "digits\0"), NOT_FOUND, "unknown model 'digits\\x00'"),
    Attack(
        "Names",
        "line breaks in a name",
        request(X[:1], "a\r\nERROR forged"),
        NOT_FOUND,
        "unknown model 'a\\r\\nERROR forged'",
    ),
    Attack("Names", "a name of 1 MB", request(X[:1], MEGABYTE), NOT_FOUND, "unknown model 'xxxxxxxx"),
    Attack(
        "Names",
        "a name of 1 MB (OIP)",
        oip_request_for(X[:1], MEGABYTE),
        NOT_FOUND,
        "unknown model 'xxxxxxxx",
    ),
    Attack(
        "Names",
        "a version that is a path",
        request(X[:1], version="../1"),
        NOT_FOUND,
        "model 'digits' has no version '../1'",
    ),
    Attack(
        "Names",
        "a version of 1 MB",
        request(X[:1], version=MEGABYTE),
        NOT_FOUND,
        "model 'digits' has no version 'xxx",
    ),
    Attack(
        "Names", "a name that is no UTF-8", b"\n\2\xff\xfe", INVALID, "are not a nnproto.v1.PredictRequest"
    ),
    Attack("Names", "an id of 1 MB", request(X[:1], id=MEGABYTE), INVALID, "the message has 10"),
    Attack(
        "Names",
        "an input of another name (OIP)",
        changed(lambda m: setattr(m.inputs[0], "name", MEGABYTE)),
        INVALID,
        "the request has the inputs 'xxxx",
    ),
    Attack(
        "Names",
        "an output of 1 MB (OIP)",
        asking_for(MEGABYTE),
        INVALID,
        "model 'digits' has no output 'xxxx",
    ),
    # Parameters.
    Attack(
        "Parameters",
        "top_k larger than there are classes",
        request(X[:1], output=3, top_k=11),
        INVALID,
        "top_k is 11; model 'digits' has 10 classes",
    ),
    Attack(
        "Parameters",
        "top_k of 2^32 - 1",
        request(X[:1], output=3, top_k=2**32 - 1),
        INVALID,
        "top_k is 4294967295",
    ),
    Attack(
        "Parameters",
        "top_k without labels",
        request(X[:1], top_k=1),
        INVALID,
        "top_k is 1; it must be 0 unless",
    ),
    Attack(
        "Parameters",
        "a kind of output that is none",
        request(X[:1], output=99),
        INVALID,
        "output is 99; expected",
    ),
    Attack(
        "Parameters",
        "timeout as text (OIP)",
        changed(set_parameter("timeout", string_param="1")),
        INVALID,
        "parameter 'timeout' is string_param; expected int64_param",
    ),
    Attack(
        "Parameters",
        "timeout below 0 (OIP)",
        changed(set_parameter("timeout", int64_param=-1)),
        INVALID,
        "parameter 'timeout' is -1; expected at least 0",
    ),
    Attack(
        "Parameters",
        "timeout without a value (OIP)",
        changed(set_parameter("timeout")),
        INVALID,
        "parameter 'timeout' is not set",
    ),
    Attack(
        "Parameters",
        "Triton's names that are not known (OIP)",
        changed(set_parameter("triton_" + MEGABYTE[:5000], bool_param=True)),
        INVALID,
        "parameter 'triton_xxx",
    ),
    Attack(
        "Parameters",
        "classification of 0 (OIP)",
        asking_for("outputs", classification={"int64_param": 0}),
        INVALID,
        "parameter 'classification' of output 'outputs' is 0",
    ),
    Attack(
        "Parameters",
        "classification as a number with a point (OIP)",
        asking_for("outputs", classification={"double_param": 1.0}),
        INVALID,
        "parameter 'classification' is double_param",
    ),
    Attack(
        "Parameters",
        "shared memory for an output (OIP)",
        asking_for("outputs", shared_memory_region={"string_param": "a"}),
        INVALID,
        "output 'outputs' is to go to shared memory",
    ),
    Attack(
        "Parameters",
        "shared memory for the input (OIP)",
        changed(lambda m: set_parameter("shared_memory_region", string_param="a")(m.inputs[0])),
        INVALID,
        "inputs is in shared memory",
    ),
    Attack(
        "Parameters",
        "30,000 parameters (OIP)",
        changed(lambda m: [set_parameter(str(i), bool_param=True)(m) for i in range(30_000)]),
        INVALID,
        "are more than 20000 fields",
    ),
    # Protocol.
    Attack(
        "Protocol",
        "garbage",
        b"\xff" * 9,
        INVALID,
        "the message's 9 bytes are not a nnproto.v1.PredictRequest",
    ),
    Attack(
        "Protocol",
        "a message cut in its midst",
        request(X[:1]).SerializeToString()[:40],
        INVALID,
        "are not a nnproto.v1.PredictRequest",
    ),
    Attack(
        "Protocol",
        "100,000 groups within each other",
        b"\x0b" * 100_000,
        INVALID,
        "the message's 100000 bytes are",
    ),
    Attack(
        "Protocol",
        "30,000 groups within each other",
        b"\x0b" * 15_000 + b"\x0c" * 15_000,
        INVALID,
        "are not a nnproto.v1.PredictRequest",
    ),
    Attack(
        "Protocol",
        "a varint without end",
        b"\x12" + b"\x80" * 1000,
        INVALID,
        "are not a nnproto.v1.PredictRequest",
    ),
    Attack(
        "Protocol",
        "a field that claims 2^63 bytes",
        b"\n" + b"\xff" * 8 + b"\x7f",
        INVALID,
        "are not a nnproto.v1.PredictRequest",
    ),
]

LINES = [
    Tried(attack.section, attack.what, attack.status, "test_a_wrong_request_is_refused") for attack in ATTACKS
]


def check_text(text: str, expected: str) -> None:
    """It says what is wrong, fits into a header, and tells nothing of the server's insides."""
    assert expected in text
    assert len(text) < MOST_TEXT
    for inside in ("Traceback", ".py", "site-packages", "/home", "/root", "/tmp", "0x7f"):
        assert inside not in text
    assert text.isprintable()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.section}: {attack.what}")
def test_a_wrong_request_is_refused(server: ServerProcess, bystander: Bystander, attack: Attack) -> None:
    """Alone with a status and a text; on a stream with both in its place, between two that are answered."""
    message = attack.bytes()
    with server.channel() as channel:
        method = channel.unary_unary(INFER if attack.service == "oip" else PREDICT)
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                method(message, timeout=PATIENCE_S)
            assert caught.value.code().name == attack.status
            check_text(caught.value.details(), attack.text)
        if attack.service == "oip":
            good = oip_request_for(X[:1], "digits", id="good").SerializeToString()
            replies = channel.stream_stream(STREAM_INFER)(iter([good, message, good]), timeout=PATIENCE_S)
            answers = [oip.ModelStreamInferResponse.FromString(reply) for reply in replies]
            assert [bool(answer.error_message) for answer in answers] == [False, True, False]
            check_text(answers[1].error_message, attack.text)
        else:
            good = request(X[:1], id="good").SerializeToString()
            replies = channel.stream_stream(PREDICT_STREAM)(iter([good, message, good]), timeout=PATIENCE_S)
            found = [own.PredictResponse.FromString(reply) for reply in replies]
            codes = [0, getattr(grpc.StatusCode, attack.status).value[0], 0]
            assert [answer.error.code for answer in found] == codes
            check_text(found[1].error.message, attack.text)


NAMED_METHODS: dict[str, Callable[[str], Any]] = {
    "/nnproto.v1.Inference/GetModel": lambda name: own.GetModelRequest(name=name),
    "/inference.GRPCInferenceService/ModelMetadata": lambda name: oip.ModelMetadataRequest(name=name),
    "/inference.GRPCInferenceService/ModelConfig": lambda name: oip.ModelConfigRequest(name=name),
    "/inference.GRPCInferenceService/ModelStatistics": lambda name: oip.ModelStatisticsRequest(name=name),
}


@pytest.mark.parametrize("path", NAMED_METHODS)
@pytest.mark.parametrize(
    "name", ["..", "../digits", "digits\0", "☺" * 500, MEGABYTE], ids=lambda name: name[:9]
)
def test_a_name_is_looked_up_and_never_a_path(
    server: ServerProcess, bystander: Bystander, path: str, name: str
) -> None:
    with server.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(NAMED_METHODS[path](name).SerializeToString(), timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(caught.value.details()) < MOST_TEXT
    assert caught.value.details().startswith("unknown model ")


BORNE: dict[str, Any] = {
    "no rows": request(X[:0]),
    "no rows (OIP)": oip_request_for(X[:0], "digits"),
    "timeout of 2^63 - 1 microseconds": changed(set_parameter("timeout", int64_param=2**63 - 1)),
    "a parameter that is not known": changed(set_parameter("☺" * 1000, double_param=float("nan"))),
    "classification of 2^62": asking_for("outputs", classification={"int64_param": 2**62}),
    "an unknown field of 1 KB": b"\x9a\x06\x80\x08" + bytes(1024) + request(X[:1]).SerializeToString(),
}


@pytest.mark.parametrize("what", BORNE)
def test_what_is_strange_and_right_is_answered(
    server: ServerProcess, bystander: Bystander, what: str
) -> None:
    message = BORNE[what]
    path = INFER if isinstance(message, oip.ModelInferRequest) else PREDICT
    data = message if isinstance(message, bytes) else message.SerializeToString()
    with server.channel() as channel:
        answers = {channel.unary_unary(path)(data, timeout=PATIENCE_S) for _ in range(2)}
    assert len(answers) == 1


_BORNE_TEST = "test_what_is_strange_and_right_is_answered"
LINES += [
    Tried(
        "Names",
        "the same for descriptions and statistics",
        NOT_FOUND,
        "test_a_name_is_looked_up_and_never_a_path",
    ),
    *(Tried("Shapes" if "rows" in what else "Parameters", what, "answered", _BORNE_TEST) for what in BORNE),
]


def strange_rows() -> np.ndarray:
    """A row of each thing that a float32 can be, between ordinary ones."""
    x = X[:12].copy()
    x[1, 3] = np.nan
    x[3, 5], x[3, 6] = np.inf, -np.inf
    x[5] = np.float32(1e-45)  # The smallest subnormal.
    x[7].view(np.uint32)[7] = 0x7FA00001  # A signalling NaN.
    x[9] = np.float32(3.4e38)
    x[11] = -0.0
    return x


VALUES = "NaN, infinities, subnormals, signalling NaN, values at the edge and -0"


@tried("Values", f"{VALUES}, in a batch with others' rows", "answered; others' rows have their bits")
def test_strange_values_change_no_bit_of_others(server: ServerProcess, bystander: Bystander) -> None:
    """Many callers at once, so that strange and ordinary rows meet in batches; each row is as if alone."""
    x = strange_rows()
    with np.errstate(over="ignore", invalid="ignore"):
        alone = np.concatenate([DIGITS.forward(row[None]) for row in x])
    ordinary = x[::2][:4]
    right = {True: alone, False: np.concatenate([DIGITS.forward(row[None]) for row in ordinary])}

    def ask(k: int) -> int:
        wrong = 0
        is_strange = bool(k % 2)
        with server.channel() as channel:
            predict, infer = channel.unary_unary(PREDICT), channel.unary_unary(INFER)
            for _ in range(25):
                rows_ = x if is_strange else ordinary
                answer = own.PredictResponse.FromString(
                    predict(request(rows_).SerializeToString(), timeout=60)
                )
                message = oip_request_for(rows_, "digits", outputs=["outputs"])
                response = oip.ModelInferResponse.FromString(infer(message.SerializeToString(), timeout=60))
                for y in (rows(answer), tensor_of(response)):
                    wrong += not same_bits(y, right[is_strange])
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 0
