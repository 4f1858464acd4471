"""A genome: the 4.9 M bases of Escherichia coli 536 (NC_008253); each base is a token.

    python -m tlinformer_jax.main --config=configs/genome.py --workdir=/tmp/genome
    python -m tlinformer_jax evaluate --workdir=/tmp/genome --split=test
    python -m tlinformer_jax generate --workdir=/tmp/genome --prompt=ATGAAA --temperature=1

Data: the Debian package bowtie-examples. The chromosome is cut into pieces of 65,536 bases; of every 20 pieces the 19th
is for validation and the 20th for the test. `bits_per_byte` is bits per base. Baselines to beat: 2 bits (all bases
equally likely), and n-grams, 1.928 with 6 bases of context:

    python -m tools.ngram_floor --config=configs/genome.py --split=test --context=7

To compare: --config.model.architecture=transformer or sliding_window. The model has 6 layers and width 256 and is
trained on 45 M tokens, ten epochs. See docs/guides/other_data.md.

Result: 1.857 bits per base of the test split; Transformer 1.858, sliding window 1.855 (one seed, one NVIDIA H200).
See docs/quality.md, "Other data".
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import default_config_dict

FOLDER = "/usr/share/doc/bowtie/examples/genomes"


def get_config() -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    recipes.set_small(config, length=2048, window=256, tokens=45_000_000, batch=16)
    config.train.keep_checkpoints = "1+1"  # the best one too, since several epochs of little text may overfit
    config.data.update(
        dataset="fasta",
        tokenizer="letters:ACGT",
        train_files=f"{FOLDER}/NC_008253.fna.gz",
    )
    return config
