"""Other curricula for recall with the token shift."""
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.experiments.plan import Sweep, overrides_between
from tlinformer_jax.experiments.recipes import package_config
POINTS = {
    "512-64-c64": ("512-64", "64:1500", {}),
    "512-64-b64": ("512-64", "", {"model.longest_wavelength": 64}),
    "1024-128-tight-c512": ("1024-128-tight", "512:2500", {}),
    "1024-128-tight-c128": ("1024-128-tight", "128:1000,512:1500", {}),
    "1024-128-tight-b64": ("1024-128-tight", "64:600,128:600,256:800,512:800", {"model.longest_wavelength": 64}),
    "1024-128-tight-c256": ("1024-128-tight", "256:1500,512:1500", {}),
}
def get_sweep(variant="all"):
    def config_of(setting, curriculum):
        config = package_config("recall")(setting)
        config.model.token_shift = True
        config.data.curriculum = curriculum
        updates = int(str(config.train.steps).split("@")[0])
        config.data.examples = DataConfig(**config.data).samples_before(updates, config.train.batch_size)
        config.train.learning_rate = 3e-3
        return config
    base = config_of("512-64", "")
    points = {name: overrides_between(base, config_of(s, c)) | more for name, (s, c, more) in POINTS.items()}
    return Sweep(base, points, then=("evaluate",), study="retrieval")
