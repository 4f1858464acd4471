"""Speech: the 568 recordings, 25 minutes, of a telephone exchange; 8-bit mu-law, a token a sample.

    python -m tlinformer_jax.main --config=configs/audio.py --workdir=/tmp/audio
    python -m tlinformer_jax evaluate --workdir=/tmp/audio --split=test
    python -m tlinformer_jax generate --workdir=/tmp/audio --prompt=128 --max_new_tokens=16000 --temperature=1 \
        --num_samples=5 --save=/tmp/audio.wav

Data: the Debian package asterisk-core-sounds-en-wav. Of every 20 recordings, in the order of their names, the 19th is
for validation and the 20th for the test; one of more than 65,536 samples counts as several. `bits_per_byte` is bits per
sample. To beat: n-grams, 4.980 with 3 samples of context:

    python -m tools.ngram_floor --config=configs/audio.py --split=test --context=3

Beside it: --config.model.architecture=transformer, and =sliding_window. A model of 6 layers and width 256, 220 M
tokens; docs/guides/other_data.md tells more.

Result: not yet measured.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import default_config_dict

FOLDER = "/usr/share/asterisk/sounds/en_US_f_Allison"


def get_config() -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    recipes.set_small(config, length=4096, window=512, tokens=220_000_000, batch=16)
    config.data.update(
        dataset="wav",
        tokenizer="ids:256",
        train_files=f"{FOLDER}/**/*.wav",
    )
    return config
