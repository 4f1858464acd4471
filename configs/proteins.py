"""Proteins: the 20,000 sequences and 9.1 M residues of MMseqs2's example; each residue is a token.

    python -m tlinformer_jax.main --config=configs/proteins.py --workdir=/tmp/proteins
    python -m tlinformer_jax evaluate --workdir=/tmp/proteins --split=test
    python -m tlinformer_jax generate --workdir=/tmp/proteins --prompt=M --temperature=1

Data: the Debian package mmseqs2-examples. Proteins that share 12 consecutive residues are a family. Of every 20
families, from the largest on, the 19th is for validation and the 20th for the test. `bits_per_byte` is bits per
residue. Baselines to beat: 4.210 (residue frequencies), and n-grams, 4.182 with 2 residues of context:

    python -m tools.ngram_floor --config=configs/proteins.py --split=test --context=2

With --config.data.shingle=0 single proteins are assigned to splits. Then most test proteins have relatives in training,
and n-grams that have seen them reach 2.792.

To compare: --config.model.architecture=transformer or sliding_window. The model has 6 layers and width 256 and is
trained on 40 M tokens, five epochs. See docs/guides/other_data.md.

Result: 4.101 bits per residue of the test split; Transformer 4.095, sliding window 4.091 (one seed, one NVIDIA H200).
See docs/quality.md, "Other data".
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import default_config_dict

FOLDER = "/usr/share/doc/mmseqs2/example-data"


def get_config() -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    recipes.set_small(config, length=1024, window=128, tokens=40_000_000, batch=32)
    config.train.keep_checkpoints = "1+1"  # the best one too, since several epochs of little text may overfit
    config.data.update(
        dataset="fasta",
        tokenizer="letters:ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        train_files=f"{FOLDER}/DB.fasta.gz",
        shingle=12,
    )
    return config
