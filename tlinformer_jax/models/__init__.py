"""Architectures: configuration, the layer, attention, the dual-window block, the four models."""

from tlinformer_jax.models.block import DualWindowBlock
from tlinformer_jax.models.config import ModelConfig
from tlinformer_jax.models.model import LanguageModel, ModelParams, build_model

__all__ = ["DualWindowBlock", "LanguageModel", "ModelConfig", "ModelParams", "build_model"]
