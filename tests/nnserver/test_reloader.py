"""Reloader: what changes on disk is served once it has stood still; what is served goes on."""

import logging
import os
import threading

import numpy as np
import pytest
from support.models import save_scale

from nnserver.batcher import QueueLimits
from nnserver.catalog import Catalog
from nnserver.reloader import Reloader
from nnserver.repository import Repository


class Watched:
    """A folder, what is served of it, and a reloader that looks when the test says so."""

    def __init__(self, folder):
        self.folder = folder
        self.repository = Repository()
        self.catalog = Catalog([str(folder)], QueueLimits(), self.repository)
        save_scale(folder / "iris.safetensors", 2.0)
        self.catalog.load_all()
        self.reloader = Reloader(self.catalog, interval_s=1.0)
        self.look()

    def look(self, times=1):
        for _ in range(times):
            self.reloader.look()

    def save(self, weight, path="iris.safetensors"):
        return save_scale(self.folder / path, weight)

    def answer(self, name="iris"):
        return float(self.repository.get(name).lane.forward(np.ones((1, 1), np.float32))[0, 0])


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path)


def test_a_file_that_is_replaced_is_served_at_the_second_look(watched):
    """The first look sees the change, the second that it has stood still."""
    watched.save(3.0)
    watched.look()
    assert watched.answer() == 2
    watched.look()
    assert watched.answer() == 3


def test_a_file_that_still_changes_is_left_alone(watched):
    """However long it takes to be copied: each look sees another size, until two see the same."""
    data = watched.save(3.0, "elsewhere/iris.safetensors").read_bytes()
    file = watched.folder / "iris.safetensors"
    for end in range(10, len(data), 50):
        file.write_bytes(data[:end])
        watched.look()
        assert watched.answer() == 2
    file.write_bytes(data)
    watched.look()
    assert watched.answer() == 2
    watched.look()
    assert watched.answer() == 3


def test_nothing_that_has_not_changed_is_loaded_again(watched):
    model = watched.repository.get("iris")
    watched.look(5)
    assert watched.repository.get("iris") is model


def test_new_models_and_versions_come_and_go(watched):
    """A new file, a new version, and a file that is taken away."""
    watched.save(5.0, "rose.safetensors")
    watched.save(7.0, "tulip/1/model.safetensors")
    watched.look(2)
    assert (watched.answer("rose"), watched.answer("tulip")) == (5, 7)
    watched.save(8.0, "tulip/2/model.safetensors")
    (watched.folder / "rose.safetensors").unlink()
    watched.look()
    assert (watched.answer("rose"), watched.answer("tulip")) == (5, 7)
    watched.look()
    assert watched.answer("tulip") == 8
    assert watched.repository.names() == ["iris", "tulip"]
    watched.save(9.0, "rose.safetensors")
    watched.look(2)
    assert watched.answer("rose") == 9


def test_a_changed_config_is_a_change(watched):
    watched.save(7.0, "tulip/1/model.safetensors")
    watched.look(2)
    (watched.folder / "tulip" / "config.toml").write_text("labels = ['no', 'yes']")
    watched.look(2)
    assert watched.repository.get("tulip").mlp.labels == ("no", "yes")


def test_a_bad_file_leaves_the_old_version_serving_and_is_told_once(watched, caplog):
    """One error in the log, not one a look; the next good file is served."""
    (watched.folder / "iris.safetensors").write_bytes(b"half")
    with caplog.at_level(logging.ERROR):
        watched.look(5)
    assert watched.answer() == 2
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "model not loaded name=iris still_served='1'"
    ]
    watched.save(3.0)
    watched.look(2)
    assert watched.answer() == 3


def test_a_name_that_becomes_ambiguous_is_told_once_and_mends(watched, caplog):
    """Two models of one name: the old one serves on; when one is gone, the reason goes, too."""
    watched.save(3.0, "iris/1/model.safetensors")
    watched.look(4)
    assert watched.answer() == 2
    assert [entry.reason for entry in watched.catalog.index()] == ["two models have this name"]
    assert caplog.text.count("model not loaded name=iris") == 1
    (watched.folder / "iris" / "1" / "model.safetensors").unlink()
    watched.look(2)
    assert [entry.reason for entry in watched.catalog.index()] == [""]


def test_a_model_that_was_unloaded_by_name_stays_so(watched):
    """Until it is loaded by name; then its changes are followed again."""
    watched.catalog.unload("iris")
    watched.save(3.0)
    watched.look(3)
    assert not watched.repository.has("iris")
    watched.catalog.bring_up_to_date("iris")
    assert not watched.repository.has("iris")
    watched.catalog.load("iris")
    watched.save(4.0)
    watched.look(2)
    assert watched.answer() == 4


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(watched, caplog):
    """It is told once, and what is served is served on; when it is back, so are changes."""
    away = watched.folder.with_name("away")
    watched.folder.rename(away)
    watched.look(3)
    assert watched.answer() == 2
    assert caplog.text.count("cannot look for changed models") == 1
    away.rename(watched.folder)
    watched.save(3.0)
    watched.look(2)
    assert watched.answer() == 3


def test_a_volume_that_is_swapped_through_a_link_is_served(watched):
    """Kubernetes replaces all files of a volume by renaming one link."""
    for data, weight in (("..1", 5.0), ("..2", 6.0)):
        watched.save(weight, f"{data}/rose.safetensors")
    (watched.folder / "..data").symlink_to("..1")
    (watched.folder / "rose.safetensors").symlink_to("..data/rose.safetensors")
    watched.look(2)
    assert watched.answer("rose") == 5
    (watched.folder / "..new").symlink_to("..2")
    os.replace(watched.folder / "..new", watched.folder / "..data")
    watched.look(2)
    assert watched.answer("rose") == 6


def test_the_thread_looks_until_it_is_stopped(watched):
    """A change is served without anybody asking; stop() leaves no thread behind."""
    has_changed = threading.Event()
    watched.repository.watch(has_changed.set)
    reloader = Reloader(watched.catalog, interval_s=0.01)
    reloader.start()
    watched.save(3.0)
    assert has_changed.wait(10)
    reloader.stop()
    assert watched.answer() == 3
    assert "nnserver-reload" not in {thread.name for thread in threading.enumerate()}
