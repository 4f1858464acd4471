"""Speech: 568 recordings (25 minutes) of a telephone exchange in 8-bit mu-law; each sample is a token.

    python -m tlinformer_jax.main --config=configs/audio.py --workdir=/tmp/audio
    python -m tlinformer_jax evaluate --workdir=/tmp/audio --split=test
    python -m tlinformer_jax generate --workdir=/tmp/audio --prompt=128 --max_new_tokens=16000 --temperature=1 \
        --num_samples=5 --save=/tmp/audio.wav

Data: the Debian package asterisk-core-sounds-en-wav. Of every 20 recordings, ordered by name, the 19th is for
validation and the 20th for the test; a recording of more than 65,536 samples counts as several. `bits_per_byte` is bits
per sample. Baseline to beat: n-grams, 4.980 with 3 samples of context:

    python -m tools.ngram_floor --config=configs/audio.py --split=test --context=3

To compare: --config.model.architecture=transformer or sliding_window. The model has 6 layers and width 256 and is
trained on 50 M tokens, 4.5 epochs. See docs/guides/other_data.md.

Result: 3.599 bits per sample of the test split; Transformer 3.613, sliding window 3.537 (one seed, one NVIDIA H200).
See docs/quality.md, "Other data".
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import default_config_dict

FOLDER = "/usr/share/asterisk/sounds/en_US_f_Allison"


def get_config() -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    recipes.set_small(config, length=4096, window=512, tokens=50_000_000, batch=8)
    config.model.dropout = 0.0  # few epochs
    config.train.keep_checkpoints = "1+1"  # the best one too, in case the last overfits
    config.data.update(
        dataset="wav",
        tokenizer="ids:256",
        train_files=f"{FOLDER}/**/*.wav",
    )
    return config
