"""Passkey experiments, second series, from 8k-plus: narrow W_oh, small updates, key taps."""
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.experiments.plan import Sweep, overrides_between
from tlinformer_jax.experiments.recipes import package_config
def windows(history, generation): return {"model.history_window": history, "model.generation_window": generation}
TIGHT = windows(32, 128)
TAPS = {"model.key_taps": 3, "model.token_shift": False}
BOTH = {"model.key_taps": 3}
X = {"data.curriculum": "256:2500@0.98,1024:1500@0.98,4096:800@0.98", "steps": 6103}
SMALL = {"data.curriculum": "256:7000@0.98,1024:3000@0.98,4096:1500@0.98", "steps": 16276, "train.batch_size": 2}  # 267 M tokens
HALF = {"data.curriculum": "256:3500@0.98,1024:2000@0.98,4096:1000@0.98", "steps": 9155, "train.batch_size": 4}  # 300 M tokens
POINTS = {
    "t-shift": TIGHT | X,
    "t-taps": TIGHT | X | TAPS,
    "t-both": TIGHT | X | BOTH,
    "s-shift": TIGHT | SMALL,
    "s-taps": TIGHT | SMALL | TAPS,
    "s-both": TIGHT | SMALL | BOTH,
    "h-shift": TIGHT | HALF,
    "h-taps": TIGHT | HALF | TAPS,
    "h-both": TIGHT | HALF | BOTH,
    "n-both": windows(16, 128) | X | BOTH,
    "n-shift": windows(16, 128) | X,
    "sw-both": windows(128, 128) | SMALL | BOTH,
    "sw-shift": windows(128, 128) | SMALL,
    "t-lr2": TIGHT | X | BOTH | {"train.learning_rate": 2e-3},
    "s-lr2": TIGHT | SMALL | BOTH | {"train.learning_rate": 2e-3},
    "s-lr05": TIGHT | SMALL | BOTH | {"train.learning_rate": 5e-4},
    "w-both": windows(32, 256) | SMALL | BOTH,
    "t-rot": TIGHT | X | BOTH | {"model.longest_wavelength": 0},
    "t-plain": TIGHT | X | {"model.token_shift": False, "model.longest_wavelength": 0},
    "t-att": TIGHT | X | BOTH | {"model.architecture": "transformer"},
    "t-attshift": TIGHT | X | {"model.architecture": "transformer"},
    "e5": TIGHT | X | {"model.key_taps": 5},
    "e3": TIGHT | X | {"model.key_taps": 3},
    "e5-noshift": TIGHT | X | {"model.key_taps": 5, "model.token_shift": False},
    "e5-rot": TIGHT | X | {"model.key_taps": 5, "model.longest_wavelength": 0},
    "e5-w256": windows(256, 256) | X | {"model.key_taps": 5},
    "t-waves": TIGHT | X | {"model.token_shift": False},
}
def get_sweep(variant="all"):
    def config_of(fields):
        config = package_config("passkey")("8k-plus")
        for name, value in fields.items():
            if name == "steps":
                config.train.update(steps=value, warmup_steps=value // 10, eval_every=value // 8)
            else:
                section, field = name.split("."); config[section][field] = value
        config.train.steps = int(str(config.train.steps).split("@")[0])
        config.data.examples = DataConfig(**config.data).samples_before(config.train.steps, config.train.batch_size)
        return config
    base = config_of({})
    points = {"pk-" + name: overrides_between(base, config_of(fields)) for name, fields in POINTS.items()}
    return Sweep(base, points, seeds=(0, 1, 2, 3, 4), then=tuple(f"evaluate@{n}" for n in (8192, 65536, 262144)), study="retrieval")
