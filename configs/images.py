"""Images as bytes: the 70,000 images of Fashion-MNIST, 28 x 28 grey levels; each image is a sample.

    python -m tlinformer_jax.main --config=configs/images.py --workdir=/tmp/images
    python -m tlinformer_jax evaluate --workdir=/tmp/images --split=test
    python -m tlinformer_jax generate --workdir=/tmp/images --prompt=0 --max_new_tokens=784 --temperature=1 \
        --num_samples=50 --save=/tmp/images.png

Data: the Debian package dataset-fashion-mnist. Of every 20 of its 60,000 images the 19th is for validation; the test
split is its 10,000 test images. `bits_per_byte` is bits per pixel. Baselines to beat, n-grams: 3.778 with the two
pixels before; 3.700 with the pixel above, the best that copying the row above can give; and 3.559 with the two pixels
above:

    python -m tools.ngram_floor --config=configs/images.py --split=test --context=2
    python -m tools.ngram_floor --config=configs/images.py --split=test --context=2 --width=28

To compare: --config.model.architecture=transformer or sliding_window. The model has 6 layers and width 256 and is
trained on 41 M tokens, 0.9 epochs. See docs/guides/other_data.md.

Result: 2.806 bits per pixel of the test split; Transformer 2.802, sliding window 2.797 (one seed, one NVIDIA H200).
See docs/quality.md, "Other data".
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import default_config_dict

FOLDER = "/usr/share/datasets/fashion-mnist"


def get_config() -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    recipes.set_small(config, length=784, window=112, tokens=41_000_000, batch=40)
    config.model.dropout = 0.0  # no image is seen twice
    config.train.eval_every = -(-config.train.steps // 4)  # the validation split has 2.4 M pixels
    config.data.update(
        dataset="idx",
        tokenizer="ids:256",
        train_files=f"{FOLDER}/train-images-idx3-ubyte.gz",
        test_files=f"{FOLDER}/t10k-images-idx3-ubyte.gz",
    )
    return config
