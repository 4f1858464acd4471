"""The embedded default: bytes of the Python language reference that every CPython carries; no download.

    python -m tlinformer_jax.main --config=configs/tiny.py --workdir=/tmp/tiny
    python -m tlinformer_jax.evaluate --workdir=/tmp/tiny

Windows are so small that seven eighths of the positions have history.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = ConfigDict()
    config.model = ConfigDict(
        {
            "architecture": "tlinformer",
            "vocab_size": 257,
            "d_model": 128,
            "num_heads": 4,
            "num_blocks": 2,
            "hidden_depth": 1,
            # an integer or 'auto'
            "history_window": FieldReference(32, field_type=object),
            "generation_window": 32,
            "dropout": 0.0,
            "dtype": "auto",
            "param_dtype": "float32",
            "attention": "auto",
            "history_segments": 2,
            "scan_layers": True,
            "remat": "none",
        }
    )
    config.train = ConfigDict(
        {
            "steps": 500,
            "batch_size": 16,
            "accumulation": 1,
            "seed": 0,
            "learning_rate": 2e-3,
            "warmup_steps": 50,
            "schedule": "cosine",
            "final_learning_rate": 0.05,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "weight_decay": 0.1,
            "decay_mask": "matrices",
            "clip_norm": 1.0,
            "loss_chunk": 8192,
            "log_every": 50,
            "eval_every": 250,
            "eval_batch_size": 0,
            "checkpoint_every": 0,
            "keep_checkpoints": 2,
        }
    )
    config.data = ConfigDict({"dataset": "pydoc", "tokenizer": "bytes", "sequence_length": 256})
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    return config
