"""The import hook of conftest.py: shapes in the package's signatures hold while the tests run."""

import importlib
import sys

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

MODULE = """
from jaxtyping import Array, Float

def attend(query: Float[Array, "rows d_h"], key: Float[Array, "keys d_h"], name: int) -> Float[Array, "rows keys"]:
    return query @ key.T if name else query
"""


def test_a_shape_that_does_not_fit_its_signature_is_an_error(tmp_path, monkeypatch):
    """In a module that stands where one of the package would."""
    import tlinformer_jax.models as room

    (tmp_path / "some_module.py").write_text(MODULE)
    monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
    attend = importlib.import_module("tlinformer_jax.models.some_module").attend
    monkeypatch.delitem(sys.modules, "tlinformer_jax.models.some_module")
    rows, keys = jnp.ones((3, 4)), jnp.ones((5, 4))
    assert attend(rows, keys, "types of other values are mypy's business").shape == (3, 5)
    for wrong in (jnp.ones((5, 6)), jnp.ones((5, 4), jnp.int32), jnp.ones((1, 5, 4))):
        with pytest.raises(TypeCheckError):
            attend(rows, wrong, 1)
    with pytest.raises(TypeCheckError):
        attend(rows, keys, 0)
