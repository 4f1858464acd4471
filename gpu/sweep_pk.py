"""Passkey experiments, from 8k-plus."""
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.experiments.plan import Sweep, overrides_between
from tlinformer_jax.experiments.recipes import package_config
W128 = {"model.history_window": 128, "model.generation_window": 128}
TAPS = {"model.key_taps": 3, "model.token_shift": False}
N16 = {"data.num_items": 16, "data.curriculum": "512:500@0.9,1024:800@0.9,4096:500@0.9"}
C98 = {"data.curriculum": "256:1500@0.98,1024:800@0.98,4096:300@0.98"}
C98X = {"data.curriculum": "256:2500@0.98,1024:1500@0.98,4096:800@0.98", "steps": 6103}
K1 = {"data.curriculum": "1024:3000@0.98,4096:800@0.98", "steps": 6103}
MUON = {"train.optimizer": "muon"}
POINTS = {
    "taps": W128 | TAPS,
    "tapsshift": W128 | {"model.key_taps": 3},
    "n16": W128 | N16,
    "taps-n16": W128 | N16 | TAPS,
    "shift": W128,
    "deep": W128 | {"model.num_blocks": 4},
    "muon": W128 | MUON,
    "taps256": TAPS,
    "taps-muon": W128 | TAPS | MUON,
    "taps-rot": W128 | TAPS | {"model.longest_wavelength": 0},
    "att-taps": W128 | TAPS | {"model.architecture": "transformer"},
    "overlap": W128 | {"model.window_overlap": 16},
    "lr2": W128 | {"train.learning_rate": 2e-3},
    "long": W128 | {"steps": 6103},
    "taps-long": W128 | TAPS | {"steps": 6103},
    "long256": {"steps": 6103},
    "c98-shift": W128 | C98,
    "c98-taps": W128 | TAPS | C98,
    "c98-shift256": C98,
    "c98-taps256": TAPS | C98,
    "c98-att": C98 | {"model.architecture": "transformer"},
    "c98-muon": W128 | C98 | MUON,
    "c98-tight-shift": W128 | {"model.history_window": 32} | C98,
    "c98-tight-taps": W128 | {"model.history_window": 32} | C98 | TAPS,
    "c98-w64-shift": {"model.history_window": 64, "model.generation_window": 64} | C98,
    "c98-w64-taps": {"model.history_window": 64, "model.generation_window": 64} | C98 | TAPS,
    "c98x-shift": W128 | C98X,
    "c98x-tapsshift": W128 | C98X | {"model.key_taps": 3},
    "c98x-taps": W128 | C98X | TAPS,
    "c98x-shift-muon": W128 | C98X | MUON,
    "k1-shift": W128 | K1,
    "k1-tapsshift": W128 | K1 | {"model.key_taps": 3},
    "k1-shift256": K1,
}
def get_sweep(variant="all"):
    def config_of(fields):
        config = package_config("passkey")("8k-plus")
        config.train.steps = TrainConfig(**config.train).updates
        for name, value in fields.items():
            if name == "steps":
                config.train.update(steps=value, warmup_steps=value // 10, eval_every=value // 8)
            else:
                section, field = name.split("."); config[section][field] = value
        config.data.examples = DataConfig(**config.data).samples_before(config.train.steps, config.train.batch_size)
        return config
    base = config_of({})
    points = {"px-" + name: overrides_between(base, config_of(fields)) for name, fields in POINTS.items()}
    return Sweep(base, points, seeds=(0, 1, 2), then=tuple(f"evaluate@{n}" for n in (8192, 65536, 262144, 1048576)), study="retrieval")
