"""RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload by way of the seam."""

import threading

import pytest
from support.calls import FakeCall
from support.models import save_scale
from support.oip import OipServer, request_for, tensor_of

from nnproto.oip import inference_pb2 as pb
from nnserver.errors import Draining, InvalidArgument, LoadFailed, NotFound, PermissionDenied


@pytest.fixture
def server(tmp_path):
    server = OipServer(paths=[str(tmp_path)], may_change=True)
    yield server
    server.api.close()


def load(server, name="iris", **fields):
    request = pb.RepositoryModelLoadRequest(model_name=name, **fields)
    server.ask("RepositoryModelLoad", request, pb.RepositoryModelLoadResponse)


def unload(server, name="iris", **fields):
    request = pb.RepositoryModelUnloadRequest(model_name=name, **fields)
    server.ask("RepositoryModelUnload", request, pb.RepositoryModelUnloadResponse)


def index(server, **fields):
    response = server.ask("RepositoryIndex", pb.RepositoryIndexRequest(**fields), pb.RepositoryIndexResponse)
    return [(model.name, model.version, model.state, model.reason) for model in response.models]


def answer(server):
    return float(tensor_of(server.infer(request_for([[1.0]])))[0, 0])


def test_a_model_is_loaded_served_and_unloaded(server, tmp_path):
    save_scale(tmp_path / "iris.safetensors", 2.0)
    assert index(server) == [("iris", "", "UNAVAILABLE", "not loaded")]
    load(server)
    assert answer(server) == 2
    assert index(server) == [("iris", "1", "READY", "")]
    save_scale(tmp_path / "iris.safetensors", 3.0)
    load(server)
    assert answer(server) == 3
    request = pb.RepositoryModelUnloadRequest(model_name="iris")
    request.parameters["unload_dependents"].bool_param = True
    server.ask("RepositoryModelUnload", request, pb.RepositoryModelUnloadResponse)
    with pytest.raises(NotFound):
        answer(server)
    assert index(server) == [("iris", "", "UNAVAILABLE", "unloaded")]


def test_what_was_learned_of_requests_does_not_outlive_the_model(server, tmp_path):
    """The same bytes are answered by the model of the moment, or not at all."""
    save_scale(tmp_path / "iris.safetensors", 2.0)
    load(server)
    assert [answer(server), answer(server)] == [2, 2]
    save_scale(tmp_path / "iris.safetensors", 3.0)
    load(server)
    assert [answer(server), answer(server)] == [3, 3]
    unload(server)
    with pytest.raises(NotFound):
        answer(server)


def test_the_index_can_be_of_what_is_ready_only(server, tmp_path):
    save_scale(tmp_path / "iris.safetensors")
    save_scale(tmp_path / "rose.safetensors")
    load(server, "rose")
    assert index(server, ready=True) == [("rose", "1", "READY", "")]


def test_a_load_that_fails_says_why_without_a_path(server, tmp_path):
    (tmp_path / "iris.safetensors").write_bytes(b"half a model")
    with pytest.raises(LoadFailed, match=r"^model 'iris' cannot be loaded: iris\.safetensors: ") as caught:
        load(server)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(NotFound, match="the repository has no model 'rose'"):
        load(server, "rose")
    with pytest.raises(NotFound, match="no model 'rose' is being served"):
        unload(server, "rose")


def test_changes_are_refused_unless_they_are_allowed(tmp_path):
    """The index is told all the same."""
    save_scale(tmp_path / "iris.safetensors")
    server = OipServer(paths=[str(tmp_path)])
    for change in (load, unload):
        with pytest.raises(PermissionDenied, match="model_control is off"):
            change(server)
    assert index(server) == [("iris", "", "UNAVAILABLE", "not loaded")]
    server.api.close()


@pytest.mark.parametrize("change", [load, unload])
def test_what_is_wrong_is_named(server, change):
    with pytest.raises(InvalidArgument, match="repository_name is 'other'; there is one repository"):
        change(server, repository_name="other")
    with pytest.raises(InvalidArgument, match="no model was named"):
        change(server, "")
    for name in ("config", "file:1/model.onnx"):
        with pytest.raises(InvalidArgument, match=f"parameter '{name}' is not taken"):
            change(server, parameters={name: pb.ModelRepositoryParameter(string_param="{}")})
    with pytest.raises(InvalidArgument, match="repository_name"):
        index(server, repository_name="other")


def test_loading_keeps_nobody_waiting(server, tmp_path, monkeypatch):
    """The call returns at once; other requests are answered while a load is under way."""
    save_scale(tmp_path / "iris.safetensors", 2.0)
    load(server)
    has_begun, may_go_on = threading.Event(), threading.Event()
    load_now = server.catalog.load

    def slow_load(name):
        has_begun.set()
        assert may_go_on.wait(10)
        load_now(name)

    monkeypatch.setattr(server.catalog, "load", slow_load)
    call = server.start(
        "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="iris").SerializeToString()
    )
    assert has_begun.wait(10)
    assert not call.has_ended
    assert answer(server) == 2
    may_go_on.set()
    call.wait_for_end()
    assert call.is_finished


def test_a_call_that_was_cancelled_while_it_waited_changes_nothing(server, tmp_path):
    save_scale(tmp_path / "iris.safetensors")
    is_free = threading.Event()
    server.api._control._thread.submit(is_free.wait, 10)
    call = FakeCall()
    server.start(
        "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="iris").SerializeToString(), call
    )
    call.has_gone = True
    is_free.set()
    assert index(server) == [("iris", "", "UNAVAILABLE", "not loaded")]


def test_after_the_end_there_are_no_more_changes(server):
    server.api.close()
    with pytest.raises(Draining):
        load(server)
