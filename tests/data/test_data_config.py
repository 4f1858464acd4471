"""DataConfig: defaults, validation, the cache's place."""

import pathlib

import pytest

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data.cache import cache_folder
from tlinformer_jax.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "wikitext2"),
        ("tokenizer", ""),
        ("sequence_length", 0),
        ("sequence_length", 512.0),
        ("sequence_length", True),
        ("text_field", ""),
        ("dataset", "wikitext103-v1"),
        ("num_items", 0),
        ("examples", True),
        ("train_files", None),
    ],
)
def test_a_refused_value_is_named_with_its_field_in_one_line(field, value):
    with pytest.raises(ConfigError) as caught:
        DataConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"data.{field} = {value!r}: must ")
    assert "\n" not in message


def test_the_cache_is_where_the_user_says_else_in_the_users_cache_directory(monkeypatch):
    for given, folder in (("/somewhere", "/somewhere"), ("~/x", pathlib.Path.home() / "x")):
        monkeypatch.setenv("TLINFORMER_CACHE", given)
        assert cache_folder() == pathlib.Path(folder)
    monkeypatch.setenv("TLINFORMER_CACHE", "s3://bucket/x")
    with pytest.raises(UserError, match=r"^TLINFORMER_CACHE = 's3://bucket/x': must be a local path"):
        cache_folder()
    monkeypatch.delenv("TLINFORMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "s3://bucket/x")
    with pytest.raises(UserError, match=r"^XDG_CACHE_HOME = 's3://bucket/x': must be a local path"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == pathlib.Path("/caches/tlinformer_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == pathlib.Path.home() / ".cache" / "tlinformer_jax"
