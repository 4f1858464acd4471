"""Exchange of weights with other implementations."""

from tlinformer_jax.interop.reference import params_from_reference, params_to_reference

__all__ = ["params_from_reference", "params_to_reference"]
