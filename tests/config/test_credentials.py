"""Credentials are masked in every form that configurations and libraries write them in, and nothing else is."""

from __future__ import annotations

import pytest

from megatron_rl.config import masked, masked_values

SECRET = "hunter2-abcdef"


@pytest.mark.parametrize(
    "text",
    [
        f"http://bob:{SECRET}@host:5000/x",
        f"postgresql://u:{SECRET}/w@h/db and more",
        f"redis://:{SECRET}@h/0",
        f"https://{SECRET}@github.com/x",
        f"https://h/x?a=1&token={SECRET}&b=2",
        f"Authorization: Bearer {SECRET}",
        f"{{'api_key': '{SECRET}'}}",
        f"mlflow.password={SECRET}, n=2",
    ],
)
def test_a_secret_is_masked(text):
    assert "hunter2" not in masked(text)
    assert "***" in masked(text)
    assert masked(masked(text)) == masked(text)


@pytest.mark.parametrize(
    "text", ["http://h:5000/a@b", "file:///a/b@c", "pad_token=5, eos token: 7", "sqlite:////tmp/mlflow.db", "a:b@c"]
)
def test_other_texts_stay(text):
    assert masked(text) == text


def test_keys_that_name_a_secret_hide_their_value_and_others_do_not():
    values = {"api_key": SECRET, "token_env": "TOKEN", "pad_token": "eos", "stop_token_ids": [1], "x": {"password": ""}}
    assert masked_values(values) == values | {"api_key": "***"}
