"""Settings from the environment: names, defaults, and what is said of a bad value."""

from typing import Any

import pytest
import torch
from click.testing import CliRunner

import app.main
from app.cli import main
from app.settings import BadSetting, Settings, from_environment

FIXED = {
    "CACHER_MODEL_NAME": "gpt2",
    "CACHER_DEVICE": "cpu",
    "CACHER_DEFAULT_TEMPERATURE": 0.7,
    "CACHER_DEFAULT_TOP_P": 0.9,
    "CACHER_DEFAULT_SEED": 42,
    "CACHER_DEFAULT_CONTEXT_SIZE": 2048,
    "CACHER_LOGITS_STORAGE": "top_k",
    "CACHER_TOP_K_LOGITS": 20,
}
"""Eight names and defaults that clients rely on."""

OURS = {
    "CACHER_HOST": "127.0.0.1",
    "CACHER_PORT": 8000,
    "CACHER_DATABASE": "cacher.db",
    "CACHER_DTYPE": "float32",
    "CACHER_API_KEYS": (),
    "CACHER_ALLOWED_MODELS": (),
}


def _value(settings: Settings, variable: str) -> Any:
    return getattr(settings, variable.removeprefix("CACHER_").lower())


@pytest.mark.parametrize(("variable", "default"), (FIXED | OURS).items())
def test_each_setting_has_its_default(variable: str, default: Any) -> None:
    found = _value(from_environment({}), variable)
    assert found == default
    assert type(found) is type(default)


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("CACHER_MODEL_NAME", "cacher-tiny", "cacher-tiny"),
        ("CACHER_DEFAULT_TEMPERATURE", "0", 0.0),
        ("CACHER_DEFAULT_TOP_P", "1", 1.0),
        ("CACHER_DEFAULT_SEED", "0", 0),
        ("CACHER_DEFAULT_SEED", "9007199254740991", 2**53 - 1),
        ("CACHER_DEFAULT_SEED", "null", None),
        ("CACHER_DEFAULT_CONTEXT_SIZE", "64", 64),
        ("CACHER_LOGITS_STORAGE", "none", "none"),
        ("CACHER_TOP_K_LOGITS", "5", 5),
        ("CACHER_PORT", "0", 0),
        ("CACHER_THREADS", "3", 3),
        ("CACHER_DTYPE", "bfloat16", "bfloat16"),
        ("CACHER_DEVICE", "cuda", "cuda"),
        ("CACHER_API_KEYS", "one, two ,,three", ("one", "two", "three")),
        ("CACHER_API_KEYS", "", ()),
        ("CACHER_ALLOWED_MODELS", "*", ("*",)),
    ],
)
def test_a_variable_sets_its_setting_and_no_other(variable: str, text: str, value: Any) -> None:
    settings = from_environment({variable: text, "PATH": "/bin", "OTHER_CACHER_PORT": "x"})
    assert _value(settings, variable) == value
    untouched = (FIXED | OURS).keys() - {variable}
    assert all(_value(settings, one) == _value(Settings(), one) for one in untouched)


BAD = [
    ("CACHER_MODEL_NAME", "", "length >= 1"),
    ("CACHER_DEVICE", "tpu", "allowed are cpu, cuda"),
    ("CACHER_HOST_CACHE_BYTES", "-1", ">= 0"),
    ("CACHER_DEFAULT_TEMPERATURE", "-0.1", ">= 0"),
    ("CACHER_DEFAULT_TEMPERATURE", "hot", "float"),
    ("CACHER_DEFAULT_TEMPERATURE", "nan", ">= 0"),
    ("CACHER_DEFAULT_TEMPERATURE", "inf", "<= 100"),
    ("CACHER_DEFAULT_TOP_P", "0", "> 0"),
    ("CACHER_DEFAULT_TOP_P", "1.5", "<= 1"),
    ("CACHER_DEFAULT_SEED", "-1", ">= 0"),
    ("CACHER_DEFAULT_SEED", "9007199254740992", "<= 9007199254740991"),
    ("CACHER_DEFAULT_SEED", "1.5", "int"),
    ("CACHER_DEFAULT_CONTEXT_SIZE", "0", ">= 1"),
    ("CACHER_LOGITS_STORAGE", "all", "none, top_k, full"),
    ("CACHER_TOP_K_LOGITS", "0", ">= 1"),
    ("CACHER_PORT", "65536", "<= 65535"),
    ("CACHER_PORT", "http", "int"),
    ("CACHER_MAX_QUEUE", "0", ">= 1"),
    ("CACHER_MAX_RESULT_BYTES", "1048575", ">= 1048576"),
    ("CACHER_DTYPE", "float16", "float32, bfloat16"),
    ("CACHER_LOG_LEVEL", "loud", "debug, info, warning, error"),
]


@pytest.mark.parametrize(("variable", "text", "allowed"), BAD)
def test_a_bad_value_is_refused_by_variable_value_and_what_is_allowed(
    variable: str, text: str, allowed: str
) -> None:
    with pytest.raises(BadSetting) as refused:
        from_environment({variable: text})
    message = str(refused.value)
    assert message.startswith(f"{variable} is {text!r}: ")
    assert allowed in message


def test_a_name_that_is_no_setting_is_refused_with_those_there_are() -> None:
    with pytest.raises(BadSetting, match="CACHER_TEMPERATUR is not a setting") as refused:
        from_environment({"CACHER_TEMPERATUR": "1"})
    assert all(variable in str(refused.value) for variable in FIXED | OURS)


def test_every_bad_variable_is_named_not_only_the_first() -> None:
    environment = {variable: text for variable, text, _ in BAD} | {"CACHER_X": "1"}
    with pytest.raises(BadSetting) as refused:
        from_environment(environment)
    named = {line.split()[0] for line in str(refused.value).splitlines()}
    assert named == environment.keys()


@pytest.mark.parametrize("command", ["serve", "verify", "migrate"])
def test_a_bad_setting_stops_every_command_with_its_message(command: str) -> None:
    environment = {"CACHER_PORT": "http", "CACHER_TOP_K_LOGITS": "0"}
    result = CliRunner().invoke(main, [command], env=environment)
    assert result.exit_code == 2
    assert "CACHER_PORT is 'http'" in result.stderr
    assert "CACHER_TOP_K_LOGITS is '0'" in result.stderr
    assert "Traceback" not in result.output


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
NO_GPU = f"CACHER_DEVICE is 'cuda': torch {torch.__version__}"


@no_gpu
@pytest.mark.parametrize("command", ["serve", "verify"])
def test_a_device_that_is_not_there_stops_a_command_before_it_begins(command: str) -> None:
    result = CliRunner().invoke(main, [command], env={"CACHER_DEVICE": "cuda"})
    assert result.exit_code == 2
    assert NO_GPU in result.stderr
    assert "Traceback" not in result.output


@no_gpu
def test_a_device_that_is_not_there_stops_a_server_of_uvicorn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CACHER_DEVICE", "cuda")
    with pytest.raises(SystemExit, match=NO_GPU.replace("+", "[+]")):
        app.main.app  # noqa: B018 - it is made when it is asked for
