"""Secrets never reach a log record, whatever quotes them."""

import logging

import pytest
from tests.conftest import LogWatch

from weightstream.log import get_logger, mask_secrets

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://AKIDEXAMPLE:{SECRET}@bucket/key",
        f"https://user:{SECRET}@host:9000/path",
        f"https://{SECRET.replace('/', '')}@host/path",
        f"GET /b/k?X-Amz-Signature={SECRET}&x=1",
        f"https://h/k?sv=1&sig={SECRET}&se=2",
        f"Authorization: AWS4-HMAC-SHA256 Credential=A/b, SignedHeaders=host, Signature={SECRET}",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f"bearer {SECRET}",
        f"S3FileSystem(key='A', secret='{SECRET}')",
        f"{{'key': '{SECRET}', 'secret': 'x'}}",
        f"aws_secret_access_key = {SECRET}",
        f"AccountKey={SECRET};EndpointSuffix=x",
    ],
)
def test_shapes_of_credentials_are_masked(text: str) -> None:
    masked = mask_secrets(text)
    assert SECRET not in masked
    assert SECRET.replace("/", "") not in masked
    assert "***" in masked


@pytest.mark.parametrize("key", ["AKIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE"])
def test_access_key_ids_are_masked(key: str) -> None:
    assert key not in mask_secrets(f"the key {key} is not known")


def test_values_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "short")
    assert mask_secrets(f"strange {SECRET}!") == "strange ***!"
    assert mask_secrets("a short word") == "a short word"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/model@v1/model-00001-of-00002.safetensors: bytes 0-8388607: 404 Not Found",
        "http://127.0.0.1:9000/bucket/x@v1/y: NoSuchKey",
        "hf://org/model@main/config.json",
        "missing key: model.layers.0.weight",
    ],
)
def test_ordinary_messages_are_left_alone(text: str) -> None:
    assert mask_secrets(text) == text


def test_logger_masks_message_arguments_and_traceback(
    caplog: pytest.LogCaptureFixture, expect_log: LogWatch
) -> None:
    expect_log("failed for")
    log = get_logger("weightstream.test_log")
    try:
        raise ValueError(f"secret={SECRET}")
    except ValueError:
        log.exception("failed for %s", f"https://u:{SECRET}@h/")
    caplog.handler.setFormatter(logging.Formatter())
    assert SECRET not in caplog.text
    assert "failed for https://***@h/" in caplog.text
    assert "ValueError" in caplog.text
