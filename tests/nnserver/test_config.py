"""Config: one value a setting from flags, environment and file, and errors that name the setting."""

import dataclasses
import re
from typing import Any

import pytest

from nnserver.config import Config, read_config
from nnserver.errors import ConfigError


def config_error(*argv, environ=None):
    with pytest.raises(ConfigError) as caught:
        read_config(argv, environ or {})
    return str(caught.value)


@pytest.fixture
def file_with(tmp_path):
    def write(text):
        path = tmp_path / "nnserver.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Where a value comes from


def test_nothing_given_is_the_defaults():
    """Without flags, environment and file every setting has the default of its definition."""
    assert read_config([], {}) == Config()


def test_a_flag_wins_over_the_environment_and_that_over_the_file(file_with):
    """Each source is used for what the ones before it do not give."""
    path = file_with("max_streams = 1\nunary_threads = 1\nstream_window = 1\n")
    environ = {"NNSERVER_MAX_STREAMS": "2", "NNSERVER_UNARY_THREADS": "2"}
    config = read_config(["--config", str(path), "--max-streams", "3"], environ)
    assert (config.max_streams, config.unary_threads, config.stream_window) == (3, 2, 1)


def test_a_flag_that_gives_the_default_wins_too(file_with):
    """A flag equal to the default is still given: it overrides environment and file."""
    path = file_with("reflection = false\n")
    assert read_config(["--config", str(path), "--reflection"], {}).reflection is True
    environ = {"NNSERVER_MAX_STREAMS": "2"}
    assert read_config(["--max-streams", str(Config.max_streams)], environ).max_streams == Config.max_streams


def test_the_file_can_be_named_in_the_environment(file_with):
    """NNSERVER_CONFIG names the file; --config wins over it."""
    path = file_with("max_streams = 7\n")
    assert read_config([], {"NNSERVER_CONFIG": str(path)}).max_streams == 7
    other = path.with_name("other.toml")
    other.write_text("max_streams = 8\n")
    assert read_config(["--config", str(other)], {"NNSERVER_CONFIG": str(path)}).max_streams == 8


def test_every_setting_can_come_from_every_source(file_with):
    """Each field of Config has a flag, an environment variable and a file key that set it."""
    values: dict[str, Any] = {
        "listen": "unix:/tmp/x",
        "log_level": "debug",
        "log_format": "json",
        "trace_endpoint": "http://localhost:4317",
        "metrics_listen": "127.0.0.1:9464",
        "transport": "grpcio",
        "grace_s": 1.5,
        "reject_nonfinite": True,
        "reflection": False,
        "reload": True,
        "reuse_port": True,
        "compress_answers": True,
        "model_control": True,
        "tokens": "tokens.toml",
    }
    for setting in dataclasses.fields(Config):
        name = setting.name
        if name == "models" or name.startswith("tls_"):
            continue  # Paths have a test of their own, and TLS settings come in pairs.
        high, low = setting.metadata["high"], setting.metadata["low"]
        value = values.get(name, max(4321, low or 0) if high is None else high)
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv = [flag if value else "--no-" + flag[2:]]
        else:
            argv = [flag, str(value)]
        toml = str(value).lower() if not isinstance(value, str) else f"'{value}'"
        sources = (
            read_config(argv, {}),
            read_config([], {f"NNSERVER_{name.upper()}": str(value)}),
            read_config(["--config", str(file_with(f"{name} = {toml}\n"))], {}),
        )
        for config in sources:
            assert getattr(config, name) == value, name
            assert config == Config(**{name: value}), name


@pytest.mark.parametrize(
    "argv", [["a", "b"], ["a", "--max-streams", "3", "b"], ["--max-streams", "3", "a", "b"]]
)
def test_models_may_stand_before_and_after_flags(argv):
    """Paths are taken from anywhere on the command line, in order."""
    assert read_config(argv, {}).models == ("a", "b")


def test_models_from_each_source(file_with):
    """The environment has paths with the separator of PATH, the file has a list; a flag's replace them."""
    path = file_with("models = ['c']\n")
    assert read_config(["--config", str(path)], {}).models == ("c",)
    assert read_config(["--config", str(path)], {"NNSERVER_MODELS": "a:b:"}).models == ("a", "b")
    assert read_config(["--config", str(path), "x"], {"NNSERVER_MODELS": "a:b"}).models == ("x",)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("true", True), ("ON", True), ("0", False), ("False", False), ("off", False)],
)
def test_words_for_true_and_false_in_the_environment(text, value):
    """1, true and on, 0, false and off, in any case."""
    assert read_config([], {"NNSERVER_REFLECTION": text}).reflection is value


def test_other_variables_are_nobodys_business():
    """Variables without the prefix are not looked at."""
    assert read_config([], {"NNCLIENT_TARGET": "x", "nnserver_listen": "x", "PATH": "/bin"}) == Config()


def test_a_kubernetes_service_called_nnserver_does_no_harm():
    """Variables that Kubernetes sets for a service of that name are not taken for settings."""
    environ = {
        "NNSERVER_SERVICE_HOST": "10.0.0.1",
        "NNSERVER_SERVICE_PORT": "50051",
        "NNSERVER_SERVICE_PORT_GRPC": "50051",
        "NNSERVER_PORT": "tcp://10.0.0.1:50051",
        "NNSERVER_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "NNSERVER_PORT_50051_TCP_ADDR": "10.0.0.1",
        "NNSERVER_PORT_50051_TCP_PORT": "50051",
        "NNSERVER_PORT_50051_TCP_PROTO": "tcp",
    }
    assert read_config([], environ) == Config()


# What is wrong


def test_an_unknown_variable_is_named_with_the_nearest_setting():
    """A misspelt variable is an error, not silence."""
    text = config_error(environ={"NNSERVER_MAX_STREAM": "3"})
    assert (
        text == "unknown setting NNSERVER_MAX_STREAM in the environment; did you mean NNSERVER_MAX_STREAMS?"
    )
    assert (
        config_error(environ={"NNSERVER_XYZZY": "3"}) == "unknown setting NNSERVER_XYZZY in the environment"
    )


def test_an_unknown_key_is_named_with_the_nearest_setting(file_with):
    """A misspelt key of the file is an error that names the file."""
    path = file_with("max_stream = 3\n")
    text = config_error("--config", str(path))
    assert text == f"unknown setting 'max_stream' in {path}; did you mean max_streams?"


@pytest.mark.parametrize("flag", ["--max-stream", "--xyzzy", "--max-message"])
def test_an_unknown_flag_ends_with_status_2(flag, capsys):
    """argparse names the flag; an abbreviation is no flag, lest a later setting change its meaning."""
    with pytest.raises(SystemExit) as caught:
        read_config([flag, "3"], {})
    assert caught.value.code == 2
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("--max-streams", "many"), ("--grace-s", "long"), ("--transport", "h3")]
)
def test_a_flag_of_the_wrong_type_ends_with_status_2(flag, value, capsys):
    """argparse names the flag and the value."""
    with pytest.raises(SystemExit) as caught:
        read_config([flag, value], {})
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert flag in error
    assert repr(value) in error


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("MAX_STREAMS", "many", "NNSERVER_MAX_STREAMS is 'many'; expected a whole number"),
        ("MAX_STREAMS", "1.5", "NNSERVER_MAX_STREAMS is '1.5'; expected a whole number"),
        ("MAX_STREAMS", "", "NNSERVER_MAX_STREAMS is ''; expected a whole number"),
        ("GRACE_S", "long", "NNSERVER_GRACE_S is 'long'; expected a number"),
        ("REFLECTION", "yes", "NNSERVER_REFLECTION is 'yes'; expected true or false"),
    ],
)
def test_a_variable_of_the_wrong_type_is_named(name, text, expected):
    """The error has the variable, its value and what was expected."""
    assert config_error(environ={f"NNSERVER_{name}": text}) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_streams = 'many'", "max_streams is 'many'; expected a whole number"),
        ("max_streams = 1.0", "max_streams is 1.0; expected a whole number"),
        ("max_streams = true", "max_streams is True; expected a whole number"),
        ("grace_s = '1'", "grace_s is '1'; expected a number"),
        ("grace_s = true", "grace_s is True; expected a number"),
        ("reflection = 1", "reflection is 1; expected true or false"),
        ("reflection = 'on'", "reflection is 'on'; expected true or false"),
        ("listen = 50051", "listen is 50051; expected text"),
        ("listen = ['a:1']", "listen is ['a:1']; expected text"),
        ("log_level = 10", "log_level is 10; expected text"),
        ("max_streams = 1979-05-27", "max_streams is datetime.date(1979, 5, 27); expected a whole number"),
    ],
)
def test_a_key_of_the_wrong_type_is_named(line, expected, file_with):
    """TOML has types, and they must be right: no '1', 1.0 or true for 1."""
    assert config_error("--config", str(file_with(line))) == expected


def test_a_whole_number_of_seconds_is_a_number(file_with):
    """grace_s = 5 in the file is 5 seconds."""
    assert read_config(["--config", str(file_with("grace_s = 5"))], {}).grace_s == 5


@pytest.mark.parametrize("models", ["'a'", "[1]", "true", "[['a']]"])
def test_models_of_the_file_must_be_a_list_of_paths(models, file_with):
    """The error names the file and what was expected."""
    path = file_with(f"models = {models}")
    text = config_error("--config", str(path))
    assert re.fullmatch(rf"models in {re.escape(str(path))} is .+; expected a list of paths", text)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_message_bytes", 1023, "max_message_bytes is 1023; expected at least 1024"),
        ("max_message_bytes", (512 << 20) + 1, "max_message_bytes is 536870913; expected at most 536870912"),
        ("max_batch_rows", 0, "max_batch_rows is 0; expected at least 1"),
        ("max_queue_requests", 0, "max_queue_requests is 0; expected at least 1"),
        ("max_queue_bytes", 0, "max_queue_bytes is 0; expected at least 1"),
        ("max_queue_rows", 0, "max_queue_rows is 0; expected at least 1"),
        ("max_queue_ms", -1, "max_queue_ms is -1; expected at least 0"),
        ("max_total_queue_requests", 0, "max_total_queue_requests is 0; expected at least 1"),
        ("max_total_queue_bytes", 0, "max_total_queue_bytes is 0; expected at least 1"),
        ("max_streams", 0, "max_streams is 0; expected at least 1"),
        ("max_streams", 10_001, "max_streams is 10001; expected at most 10000"),
        ("stream_window", 0, "stream_window is 0; expected at least 1"),
        ("max_concurrent_calls", 0, "max_concurrent_calls is 0; expected at least 1"),
        ("unary_threads", 0, "unary_threads is 0; expected at least 1"),
        ("unary_threads", 257, "unary_threads is 257; expected at most 256"),
        ("kernel_threads", -1, "kernel_threads is -1; expected at least 0"),
        ("kernel_threads", 1025, "kernel_threads is 1025; expected at most 1024"),
        ("grace_s", -0.1, "grace_s is -0.1; expected at least 0.0"),
        ("grace_s", float("nan"), "grace_s is nan; expected at least 0.0"),
        ("grace_s", float("inf"), "grace_s is inf; expected at most 86400"),
        ("log_level", "loud", "log_level is 'loud'; expected one of debug, info, warning, error"),
        ("transport", "h3", "transport is 'h3'; expected one of h2, grpcio"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_the_bound(name, value, expected):
    """The same text whatever source the value came from; NaN is out of every bound."""
    with pytest.raises(ConfigError) as caught:
        Config(**{name: value})
    assert str(caught.value) == expected
    if name not in ("log_level", "transport"):
        assert config_error(f"--{name.replace('_', '-')}", str(value)) == expected
        assert config_error(environ={f"NNSERVER_{name.upper()}": str(value)}) == expected


@pytest.mark.parametrize(
    "listen",
    [
        "", ":", ":50051", "localhost", "localhost:", "localhost:x", "localhost:-1", "localhost:65536",
        "localhost:٣", "localhost:1_0", "50051", "::1:50051", "::1", "[::1]", "a b:1",
        "http://localhost:1", "localhost:123456789123456789",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(listen):
    """HOST:PORT has a host and a port in [0, 65535]; an IPv6 host stands in brackets."""
    assert config_error("--listen", listen) == f"listen is {listen!r}; expected HOST:PORT or unix:PATH"


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:0", "localhost:65535", "[::1]:50051", "[::]:1", "unix:a", "unix:/a/b"]
)
def test_addresses(listen):
    """IPv4, names, bracketed IPv6 and Unix sockets, relative or absolute."""
    assert read_config(["--listen", listen], {}).listen == listen


def test_a_unix_address_needs_a_path():
    """unix: alone is no address."""
    assert config_error("--listen", "unix:") == "listen is 'unix:'; expected unix:PATH"


def test_certificate_and_key_go_together():
    """TLS needs both files, and mutual TLS needs TLS."""
    both = "tls_certificate and tls_key go together; only one of them is set"
    assert config_error("--tls-certificate", "c.pem") == both
    assert config_error("--tls-key", "k.pem") == both
    assert config_error("--tls-client-ca", "ca.pem") == "tls_client_ca needs tls_certificate and tls_key"
    config = read_config(["--tls-certificate", "c", "--tls-key", "k", "--tls-client-ca", "a"], {})
    assert (config.tls_certificate, config.tls_key, config.tls_client_ca) == ("c", "k", "a")


def test_a_missing_file_is_named(tmp_path):
    """The error has the path and the reason."""
    path = tmp_path / "none.toml"
    assert config_error("--config", str(path)) == (
        f"cannot read the configuration file {path}: No such file or directory"
    )
    assert config_error("--config", str(tmp_path)).endswith("Is a directory")


@pytest.mark.parametrize(
    "content", [b"max_streams 3", b"\xff\xfe", b"max_streams = 1\nmax_streams = 2\n", b"\x00"]
)
def test_a_file_that_is_not_toml_is_named(content, tmp_path):
    """The error has the path and what the parser says."""
    path = tmp_path / "nnserver.toml"
    path.write_bytes(content)
    assert config_error("--config", str(path)).startswith(f"the configuration file {path} is not TOML: ")


def test_all_cores_of_this_process_are_the_kernel_threads(monkeypatch):
    """kernel_threads 0 becomes the number of cores that the process may run on."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 4, 5})
    assert Config().kernel_threads == 3


def test_config_is_frozen_and_hashable():
    """A Config cannot be changed, whatever source its models came from."""
    config = read_config(["a"], {})
    hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.listen = "x:1"  # type: ignore[misc]


def test_help_lists_every_setting_with_its_default(capsys):
    """--help exits with 0, and has each flag and what it does."""
    with pytest.raises(SystemExit) as caught:
        read_config(["--help"], {})
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in dataclasses.fields(Config):
        if setting.name != "models":
            assert f"--{setting.name.replace('_', '-')}" in text
        assert " ".join(setting.metadata["help"].split()) in text


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.5.0.1:1", "[::1]:2", "localhost:3", "unix:/run/x"])
def test_model_control_is_for_this_machine(listen):
    """Loopback addresses and Unix sockets: whoever connects is on this machine."""
    assert read_config(["--model-control", "--listen", listen], {}).model_control


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "[fe80::1%eth0]:1"])
def test_model_control_is_refused_beyond_it(listen):
    """Where clients are not told apart, nobody else's may load and unload; where they are, they may."""
    assert config_error("--model-control", "--listen", listen) == (
        f"model_control lets whoever reaches {listen} load and unload models; expected tokens, a file that "
        "says who may, or listen to be a loopback address (127.0.0.1, [::1], localhost) or unix:PATH"
    )
    assert read_config(["--model-control", "--listen", listen, "--tokens", "tokens.toml"], {}).model_control


def test_answers_are_compressed_by_h2_only():
    """grpcio compresses for clients that cannot read it."""
    with pytest.raises(ConfigError, match=r"^compress_answers needs transport h2; grpcio would"):
        Config(transport="grpcio", compress_answers=True)


def test_a_unix_socket_cannot_be_shared():
    """A path is one server's: the second would take it from the first."""
    with pytest.raises(ConfigError, match=r"^reuse_port is for TCP; unix:/tmp/x is a Unix socket"):
        read_config(["--reuse-port", "--listen", "unix:/tmp/x"], {})
