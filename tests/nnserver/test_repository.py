"""Repository: names and versions to served models, replaced at once under look-ups that take no lock."""

import dataclasses

import pytest
from support.models import random_mlp
from support.serving import served

from nnserver.errors import NotFound
from nnserver.repository import Repository


def model(name, version="1"):
    return dataclasses.replace(served(random_mlp(0, [2, 1]), name), version=version)


def ids(models):
    return [(model.name, model.version) for model in models]


def test_all_versions_of_all_names_come_sorted():
    """By name, then by version as a number: 9 before 10."""
    repository = Repository([model("b", "10"), model("a", "2"), model("b", "9")])
    assert ids(repository) == [("a", "2"), ("b", "9"), ("b", "10")]
    assert repository.names() == ["a", "b"]
    assert ids(repository.versions("b")) == [("b", "9"), ("b", "10")]
    assert repository.versions("c") == []
    assert repository.has("a")
    assert not repository.has("c")


def test_without_a_version_the_default_answers():
    """The last one that was put is the default, whatever its number."""
    repository = Repository()
    repository.put([model("a", "3"), model("a", "2")])
    assert repository.get("a").version == "2"
    assert repository.get("a", "3").version == "3"


def test_put_replaces_a_name_as_a_whole():
    """Versions that are not among the new ones are gone; other names are as they were."""
    repository = Repository([model("a", "1"), model("a", "2"), model("b")])
    repository.put([model("a", "3")])
    assert ids(repository) == [("a", "3"), ("b", "1")]
    repository.remove("a")
    repository.remove("a")
    assert ids(repository) == [("b", "1")]


def test_an_unknown_name_lists_what_there_is():
    """NotFound has the names; without a name it says that one is missing."""
    repository = Repository([model("iris"), model("tulip")])
    with pytest.raises(NotFound, match=r"^unknown model 'rose'; this server has 'iris', 'tulip'$"):
        repository.get("rose")
    with pytest.raises(NotFound, match=r"^no model was named; this server has 'iris', 'tulip'$"):
        repository.get("")
    with pytest.raises(NotFound, match=r"^unknown model 'iris'; this server has no models$"):
        Repository().get("iris")


def test_an_unknown_version_lists_what_there_is():
    """NotFound has the versions of the name, as numbers ascend."""
    repository = Repository([model("iris", "10"), model("iris", "9")])
    with pytest.raises(NotFound, match=r"^model 'iris' has no version '1'; it has version '9', '10'$"):
        repository.get("iris", "1")


def test_a_long_list_is_cut():
    """A status text is a header: twenty names, and how many more."""
    repository = Repository([model(f"m{i:02}") for i in range(25)])
    with pytest.raises(NotFound) as caught:
        repository.get("x" * 1000)
    text = str(caught.value)
    assert text.endswith("'m19' and 5 more")
    assert len(text) < 400
