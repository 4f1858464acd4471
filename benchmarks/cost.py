"""Counts what a token costs for several lengths of text: `python -m benchmarks.cost`.

Prints two Markdown tables for models of the 41M shape. Training: model FLOPs of the forward and backward pass for each
token of a sequence. Generation: FLOPs, and bytes read in bfloat16, for each token after a text of that length, averaged
over a generation window and its slide. Nothing is measured, and no device is needed.
"""

from absl import flags

from benchmarks.token_cost import generation_cost, training_cost
from tlinformer_jax.commands import cli
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.files import markdown

LENGTHS = flags.DEFINE_list("at", ["1024", "8192", "65536", "1048576"], "Lengths of the text, in tokens.")
MODELS = {
    "Transformer": ModelConfig(architecture="transformer", dtype="bfloat16"),
    "TLinFormer 256/256": ModelConfig(dtype="bfloat16"),
    "TLinFormer 256/256, causal history": ModelConfig(causal_history=True, dtype="bfloat16"),
    "TLinFormer 1024/1024": ModelConfig(history_window=1024, generation_window=1024, dtype="bfloat16"),
    "TConstFormer 256/256": ModelConfig(architecture="tconstformer", dtype="bfloat16"),
    "sliding window 256 + 256": ModelConfig(architecture="sliding_window", dtype="bfloat16"),
    "Gated DeltaNet": ModelConfig(architecture="gated_deltanet", dtype="bfloat16"),
    "Gated DeltaNet, hybrid": ModelConfig(architecture="gated_deltanet_hybrid", dtype="bfloat16"),
}


def main() -> None:
    """Prints both tables."""
    lengths = cli.integers(LENGTHS, 1)
    columns = [f"{length:,}" for length in lengths]
    trained = [
        (name, *(f"{training_cost(config, length) / 1e6:,.0f}" for length in lengths))
        for name, config in MODELS.items()
    ]
    generated = []
    for name, config in MODELS.items():
        costs = [generation_cost(config, length) for length in lengths]
        generated.append((name, *(f"{flops / 1e6:,.0f} / {read / 1e6:,.0f}" for flops, read in costs)))
    print("\n".join(markdown(["training, MFLOP a token", *columns], trained)))
    print("\n".join(["", *markdown(["generation, MFLOP / MB read a token", *columns], generated)]))


if __name__ == "__main__":
    cli.run(main)
