"""config.toml: every setting, and errors that name the one that is wrong."""

import pytest

from nnserver.batcher import QueueLimits
from nnserver.model_settings import ModelSettings, SettingsError, VersionPolicy, parse_settings


def test_an_empty_file_says_nothing():
    assert parse_settings("") == ModelSettings()


def test_every_setting():
    settings = parse_settings("""
        version_policy = {specific = [3, 1]}
        default_version = 1
        labels = ["a", "b"]
        outputs = ["labels", "outputs"]
        [limits]
        max_queue_requests = 10
        max_queue_bytes = 20
        max_queue_rows = 40
        [batching]
        max_batch_rows = 30
    """)
    assert settings == ModelSettings(
        VersionPolicy(specific=(3, 1)), 1, ("a", "b"), ("labels", "outputs"), 10, 40, 20, 30
    )
    assert settings.limits(QueueLimits(1, 2, 3, 4)) == QueueLimits(10, 20, 30, 40)


def test_limits_that_are_not_given_are_the_servers():
    settings = parse_settings("[limits]\nmax_queue_bytes = 20")
    assert settings.limits(QueueLimits(1, 2, 3)) == QueueLimits(1, 20, 3)


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        ('"all"', [1, 2, 9, 10]),
        ("{latest = 1}", [10]),
        ("{latest = 3}", [2, 9, 10]),
        ("{latest = 99}", [1, 2, 9, 10]),
        ("{specific = [10, 2]}", [2, 10]),
    ],
)
def test_version_policies_choose(policy, chosen):
    """As numbers: 10 comes after 9."""
    settings = parse_settings(f"version_policy = {policy}")
    assert settings.version_policy.choose([9, 10, 1, 2]) == chosen


def test_a_specific_version_must_be_there():
    with pytest.raises(SettingsError, match=r"^version_policy names version 3; there are \[1, 2\]$"):
        VersionPolicy(specific=(1, 3)).choose([2, 1])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("version_policy = ", "is not TOML: "),
        ("version_policy = 'some'", "version_policy is 'some'; expected \"all\", {latest = N} or"),
        ("version_policy = {latest = 0}", "version_policy is {'latest': 0}; expected"),
        ("version_policy = {latest = true}", "version_policy is {'latest': True}; expected"),
        ("version_policy = {latest = 1, specific = [1]}", "version_policy is {"),
        ("version_policy = {specific = []}", "version_policy is {'specific': []}; expected"),
        ("version_policy = {specific = ['1']}", "version_policy is {'specific': ['1']}; expected"),
        ("default_version = 0", "default_version is 0; expected a whole number from 1"),
        ("default_version = 1.0", "default_version is 1.0; expected a whole number from 1"),
        ("default_version = 3000000000", "default_version is 3000000000; expected"),
        ("labels = 'a'", "labels is 'a'; expected a list of texts"),
        ("labels = [1]", "labels is [1]; expected a list of texts"),
        ("outputs = []", "outputs is []; expected some of outputs, probabilities, labels, each once"),
        ("outputs = ['logits']", "outputs is ['logits']; expected"),
        ("outputs = ['labels', 'labels']", "outputs is ['labels', 'labels']; expected"),
        ("limits = 3", "limits is 3; expected a table, [limits]"),
        ("[limits]\nmax_queue_bytes = -1", "limits.max_queue_bytes is -1; expected"),
        ("[batching]\nmax_batch_rows = 'x'", "batching.max_batch_rows is 'x'; expected"),
        ("label = []", "unknown setting label; did you mean labels?"),
        (
            "[batching]\nmax_rows = 3",
            "unknown setting batching.max_rows; did you mean batching.max_batch_rows?",
        ),
        ("colour = 1", "unknown setting colour"),
    ],
)
def test_what_is_wrong_is_named(text, error):
    with pytest.raises(SettingsError) as caught:
        parse_settings(text)
    assert str(caught.value).startswith(error)
