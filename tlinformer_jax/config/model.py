"""The model's configuration: one frozen, validated value that every part of the library reads."""

import dataclasses
import math
from typing import Any

from tlinformer_jax.config.delta import DeltaShape, delta_shape
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.errors import TRUE_OR_FALSE, ConfigError, Rule, check_fields, integer, number, one_of
from tlinformer_jax.parallel.mesh import is_nvidia_gpu, platform

ARCHITECTURES = (
    "tlinformer",
    "tconstformer",
    "transformer",
    "sliding_window",
    "gated_deltanet",
    "gated_deltanet_hybrid",
)
# In tables and figures, in the order of their columns.
ARCHITECTURE_NAMES = {
    "transformer": "Transformer",
    "sliding_window": "sliding window",
    "gated_deltanet": "Gated DeltaNet",
    "gated_deltanet_hybrid": "Gated DeltaNet, hybrid",
    "tlinformer": "TLinFormer",
    "tconstformer": "TConstFormer",
}
WINDOWED = ("tlinformer", "tconstformer")
RECURRENT = ("gated_deltanet", "gated_deltanet_hybrid")
COMPUTE_DTYPES = ("auto", "bfloat16", "float16", "float32")
ATTENTION_BACKENDS = ("auto", "xla", "cudnn", "splash", "deterministic")
MEMORY = ("auto", "low")
LARGEST_VOCABULARY = 2**31 - 1  # token ids are int32
SHORTEST_WAVELENGTH = 7  # RoPE's shortest wavelength, 2 pi, rounded up
# Evaluation and caches allocate a whole window, so a window needs a bound.
LONGEST_WINDOW = 1 << 20
# A sequence with at most this many windows is differentiated as a whole. In a longer sequence each window's gradients
# are computed with its loss, since the memory for the backward pass would grow with the square of the length.
FEW_WINDOWS = 8
# In a sequence this short, masked rows of the history cost less than a second program, and computing one window at a
# time would leave a device idle.
SHORT_SEQUENCE = 1024
# If a sequence of few windows is not short, an accelerator computes NARROW_GROUP of them at a time, each group with its
# gradients, or WIDE_GROUP if the model has more than NARROW features. On an H200 at N = 2,048 that takes 53% (41M
# parameters) and 37% (125M) of the memory of all windows together, is 3% and 8% faster, and compiles 14 and 12 s more.
NARROW, NARROW_GROUP, WIDE_GROUP = 512, 3, 2
# With `causal_history` windows restore no rows, so that many fit into memory: CAUSAL_GROUP together (not measured), or
# SHARING_GROUP where a kernel lets them share keys, for heads of at most SHARING_WIDTH features. So many store their
# activations, too, as a Transformer does: on an H200 31 windows (41M) train 23% faster than in four groups with copies.
CAUSAL_GROUP, SHARING_GROUP, SHARING_WIDTH = 8, 32, 128
# More layers than this are compiled once and looped over, in one segment; otherwise libtpu compiles for an hour.
MOST_UNROLLED = 20
# The parameters of a model are described layer by layer before they are compared with a checkpoint: 8 s at this number.
MOST_LAYERS = 1000
# With memory 'low', a history of more than WHOLE_HISTORY rows is restored in chunks of CHUNK rows, since the
# intermediate values of more rows do not fit beside it on one device.
WHOLE_HISTORY, CHUNK = 1 << 20, 1 << 16
# In the hybrid every fourth layer is an attention layer.
HYBRID_PERIOD = 4
# Most key taps of a block.
MOST_TAPS = 8


RULES = {
    "architecture": one_of(*ARCHITECTURES),
    "dtype": one_of(*COMPUTE_DTYPES),
    "attention": one_of(*ATTENTION_BACKENDS),
    "memory": Rule(one_of(*MEMORY).allowed, lambda memory: memory in MEMORY or isinstance(memory, ExecutionPlan)),
    "vocab_size": integer(1, LARGEST_VOCABULARY),
    **dict.fromkeys(("d_model", "num_heads", "num_blocks", "experts_per_token"), integer(1)),
    **dict.fromkeys(("hidden_depth", "num_experts", "window_overlap"), integer(0)),
    "d_ff": Rule(integer(1).allowed, lambda size: size is None or integer(1).holds(size)),
    "longest_wavelength": Rule(
        f"must be 0, or an integer >= {SHORTEST_WAVELENGTH}, because the shortest wavelength is 2 pi",
        lambda longest: integer(0).holds(longest) and not 0 < longest < SHORTEST_WAVELENGTH,
    ),
    "history_window": integer(1, pattern="auto", also=" or 'auto'"),
    "generation_window": integer(1, LONGEST_WINDOW),
    **dict.fromkeys(("causal_history", "token_shift"), TRUE_OR_FALSE),
    "key_taps": integer(0, MOST_TAPS),
    "dropout": number("must be a number in [0, 1)", lambda rate: 0 <= rate < 1),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a model; the defaults are the paper's 41M TLinFormer with windows 256/256.

    Attributes:
      architecture: 'tlinformer'; 'tconstformer' (in its `compress` layer the generation window does not read the
        history); 'transformer' (causal attention to everything); 'sliding_window' (causal attention to the last
        history_window + generation_window positions); 'gated_deltanet' (a recurrent state of constant size, arXiv
        2412.06464); 'gated_deltanet_hybrid' (every fourth layer is an attention layer, the others are Gated DeltaNet;
        with fewer than four layers the last is the attention layer). The last four have num_blocks * (hidden_depth + 2)
        layers, so that equal fields mean equal numbers of parameters. For Gated DeltaNet layers this holds to 0.1%, by
        their feed-forward's width (see `config.delta.delta_shape`).
      vocab_size: V, number of token ids. In a run's configuration also 'auto', the default: the size of the tokenizer,
        rounded up to a multiple of 128.
      d_model: D, the width of a row.
      num_heads: attention heads; d_model / num_heads must be a whole, even number (RoPE rotates pairs).
      num_blocks: B, blocks, each of hidden_depth + 2 layers.
      hidden_depth: H, hidden layers of a block, between `compress` and `restore`.
      d_ff: F, feed-forward width; None means 256 * ceil((8 * D // 3) / 256).
      num_experts: E, experts in the feed-forward of every layer, each of width F; 0 or 1 for no experts.
      experts_per_token: experts that a router chooses for each row; ignored without experts.
      history_window: W_oh, rows of z, the compressed history; 'auto' grows with the history n as
        8 * floor((12 * ln(n) + 7) / 8).
      generation_window: W_og, tokens of a window that are predicted together.
      window_overlap: o < W_og; every window except the first also runs the o tokens before it, so that its first tokens
        have neighbours. These o tokens are not predicted in this window, nor part of its history. 0 in the paper.
      causal_history: whether the history is computed like the generation window: each row attends to rows up to its
        own in one softmax, and the next block continues z instead of restoring it from C. Rows before z do not depend
        on the window, so a slide only appends to them. If W_oh covers the whole history, the model is a Transformer.
        Only for 'tlinformer', without `window_overlap`. See `models.causal_history`. Not in the paper.
      token_shift: whether the input of the first layer's keys is e_t + s * e_(t-1): each token's embedding plus a
        learned multiple of the previous token's, with a vector s of D numbers that starts at 0. Not in the paper. A
        query can then find a row by the token before it, so that recall takes one layer.
      key_taps: K, how many tokens before its own a key of the history knows in the blocks after the first, whose
        `compress` layers compute the keys of C' from C'_t + s_1 * e_(t-1) + ... + s_K * e_(t-K). Each block has its own
        K vectors of D numbers, which start at 0. Only for 'tlinformer' and 'tconstformer': the rows of others read the
        rows before them. 0 in the paper.
      longest_wavelength: longest wavelength of rotary positions, in tokens. Feature pairs with a longer one are not
        rotated (p-RoPE), so that longer distances than in training make no new angles. 0 rotates all, as in the paper.
      dropout: rate of dropout of attention weights and of the feed-forward's output, in training only.
      dtype: dtype of the computation; 'auto' is bfloat16 on accelerators and float32 on the CPU. float16 has no loss
        scaling, so it is for evaluation. Softmax, rotary angles, LayerNorm statistics and the loss are always float32.
      attention: backend of the attention kernel; 'auto' chooses the best for the device and the shapes; 'deterministic'
        chooses without cuDNN, whose backward pass XLA cannot make deterministic.
      memory: 'auto', or 'low' for the longest sequences on one device. 'low' means one window at a time, more segments,
        checkpointing, and chunks of the history beyond a million tokens. Python callers may give an `ExecutionPlan`.
    """

    architecture: str = "tlinformer"
    vocab_size: int = 50257
    d_model: int = 432
    num_heads: int = 12
    num_blocks: int = 2
    hidden_depth: int = 2
    d_ff: int | None = None
    num_experts: int = 0
    experts_per_token: int = 2
    history_window: int | str = 256
    generation_window: int = 256
    window_overlap: int = 0
    causal_history: bool = False
    token_shift: bool = False
    key_taps: int = 0
    longest_wavelength: int = 0
    dropout: float = 0.0
    dtype: str = "auto"
    attention: str = "auto"
    memory: str | ExecutionPlan = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str):  # dtypes such as jnp.bfloat16 are allowed, too
            object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        if hasattr(self.memory, "items"):  # a plan as config.json holds it
            object.__setattr__(self, "memory", _plan_of(self.memory))
        check_fields("model", self, RULES)
        if self.mixture and self.experts_per_token > self.num_experts:
            allowed = f"must be at most model.num_experts = {self.num_experts}"
            raise ConfigError("model.experts_per_token", self.experts_per_token, allowed)
        if self.window_overlap and not self.windowed:
            allowed = f"must be 0 for model.architecture = {self.architecture!r}"
            raise ConfigError("model.window_overlap", self.window_overlap, allowed)
        if self.causal_history and self.architecture != "tlinformer":
            allowed = f"must be False for model.architecture = {self.architecture!r}"
            raise ConfigError("model.causal_history", True, allowed)
        if self.causal_history and self.window_overlap:
            allowed = f"must be False for model.window_overlap = {self.window_overlap}"
            raise ConfigError("model.causal_history", True, allowed)
        # With an overlap of W_og the second window would have no history either.
        if self.window_overlap >= self.generation_window:
            allowed = f"must be less than model.generation_window = {self.generation_window}"
            raise ConfigError("model.window_overlap", self.window_overlap, allowed)
        if self.longest_wavelength and self.architecture == "gated_deltanet":
            allowed = "must be 0 for model.architecture = 'gated_deltanet', which has no rotary positions"
            raise ConfigError("model.longest_wavelength", self.longest_wavelength, allowed)
        if self.attention in ("cudnn", "splash") and self.dropout > 0:
            allowed = "has no attention dropout; use 'auto', or model.dropout = 0"
            raise ConfigError("model.attention", self.attention, allowed)
        if self.attention in ("cudnn", "splash") and self.causal_history:
            allowed = "has no log-sum-exp with a gradient; use 'auto', or model.causal_history = False"
            raise ConfigError("model.attention", self.attention, allowed)
        if self.num_layers > MOST_LAYERS:
            made = f"with model.hidden_depth = {self.hidden_depth} it makes {self.num_layers:,}"
            raise ConfigError("model.num_blocks", self.num_blocks, f"must make at most {MOST_LAYERS:,} layers; {made}")
        if self.d_model % self.num_heads:
            raise ConfigError("model.num_heads", self.num_heads, f"must divide model.d_model = {self.d_model}")
        if self.head_dim % 2:
            even = "model.d_model / model.num_heads must be even (RoPE rotates pairs)"
            raise ConfigError("model.num_heads", self.num_heads, f"makes heads {self.head_dim} wide; {even}")
        if self.architecture == "sliding_window" and self.history_window == "auto":
            raise ConfigError("model.history_window", "auto", "must be an integer for architecture 'sliding_window'")
        if self.recurrent and self.delta.feed_forward < 1:
            least = self.feed_forward_dim + 1 - self.delta.feed_forward
            allowed = f"must be at least {least} for architecture {self.architecture!r}, whose mixer takes from it"
            raise ConfigError("model.d_ff", self.d_ff, allowed)
        if self.recurrent and self.token_shift:
            allowed = f"must be False for architecture {self.architecture!r}, whose keys have a convolution"
            raise ConfigError("model.token_shift", True, allowed)
        if self.key_taps and not self.windowed:
            allowed = f"must be 0 for model.architecture = {self.architecture!r}, whose rows read the rows before them"
            raise ConfigError("model.key_taps", self.key_taps, allowed)
        if self.key_taps and self.num_blocks == 1:
            allowed = "must be 0 for model.num_blocks = 1, because only later blocks have key taps"
            raise ConfigError("model.key_taps", self.key_taps, allowed)

    @property
    def head_dim(self) -> int:
        """d_h, features of one head."""
        return self.d_model // self.num_heads

    @property
    def attention_scale(self) -> float:
        """1 / sqrt(d_h), where d_h is the width of a head without padding."""
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def feed_forward_dim(self) -> int:
        """F: `d_ff`, or its rule if `d_ff` is None."""
        return self.d_ff if self.d_ff is not None else 256 * math.ceil((8 * self.d_model // 3) / 256)

    @property
    def mixture(self) -> bool:
        """Whether feed-forwards are mixtures of experts."""
        return self.num_experts > 1

    @property
    def active_experts(self) -> int:
        """SwiGLUs that each row uses in a layer."""
        return self.experts_per_token if self.mixture else 1

    @property
    def delta(self) -> DeltaShape:
        """Shape of the Gated DeltaNet layers that replace standard layers of this model."""
        return delta_shape(self.d_model, self.head_dim, self.feed_forward_dim)

    def attends(self, layer: int) -> bool:
        """Returns whether layer `layer` of a baseline is an attention layer."""
        if self.architecture not in RECURRENT:
            return True
        last = min(HYBRID_PERIOD, self.num_layers) - 1
        return self.architecture == "gated_deltanet_hybrid" and layer % HYBRID_PERIOD == last

    def index_in_kind(self, layer: int) -> int:
        """Returns the index of a layer among the layers of its kind, attention or Gated DeltaNet."""
        return sum(self.attends(index) == self.attends(layer) for index in range(layer))

    @property
    def key_reach(self) -> int:
        """How many tokens before its own a key of a `compress` layer, or of a baseline's first layer, is made of."""
        return max(int(self.token_shift), self.key_taps)

    @property
    def attention_layers(self) -> int:
        """Number of attention layers."""
        return sum(map(self.attends, range(self.num_layers)))

    @property
    def layers_per_block(self) -> int:
        """Number of layers of a block: compress, the hidden layers, restore."""
        return self.hidden_depth + 2

    @property
    def num_layers(self) -> int:
        """Number of layers in total, for every architecture."""
        return self.num_blocks * self.layers_per_block

    @property
    def windowed(self) -> bool:
        """Whether the architecture has generation windows."""
        return self.architecture in WINDOWED

    @property
    def recurrent(self) -> bool:
        """Whether the architecture has Gated DeltaNet layers."""
        return self.architecture in RECURRENT

    @property
    def grows(self) -> bool:
        """Whether a cache grows with its sequence."""
        return self.architecture in ("tlinformer", "tconstformer", "transformer", "gated_deltanet_hybrid")

    @property
    def compute_dtype(self) -> Any:
        """The dtype of the computation, 'auto' resolved for the default device."""
        import jax.numpy as jnp  # imported here, because reading a configuration must not need JAX

        if self.dtype != "auto":
            return jnp.dtype(self.dtype)
        return jnp.dtype("float32" if platform() == "cpu" else "bfloat16")

    def plan(self, windows: int = 1, alone: bool = False) -> ExecutionPlan:
        """Returns the plan for `windows` generation windows on the default device; see `training_plan` for `alone`."""
        if isinstance(self.memory, ExecutionPlan):
            return self.memory
        low, few, length = self.memory == "low", windows <= FEW_WINDOWS, windows * self.generation_window
        cpu, deep, short = platform() == "cpu", self.num_layers > MOST_UNROLLED, length <= SHORT_SEQUENCE
        several = 8 if low and not few else 2 - deep
        sharing = self.causal_history and self.shares_keys
        grouped = (few or self.causal_history) and windows > 1 and not short and not cpu
        group = NARROW_GROUP if self.d_model <= NARROW else WIDE_GROUP
        if self.causal_history:
            group = SHARING_GROUP if sharing else CAUSAL_GROUP
        stored = sharing and windows <= SHARING_GROUP and not (low or alone)
        together = min(group, windows - 1) if grouped else windows if few or short else 1
        return ExecutionPlan(
            segments=1 if short or stored else several,
            together=1 if low or cpu else together,
            chunk=CHUNK if low and length > WHOLE_HISTORY else 0,
            scan_layers=cpu or deep,
            checkpointing=low or (self.windowed and (grouped or not few) and not stored),
            # On an H200 8% (41M, N = 8,192), 14% (125M) and 16% (41M, N = 65,536) faster; of few windows no faster than
            # groups. Not measured on TPUs, nor with scanned layers.
            paired=self.pairable and is_nvidia_gpu() and not (few or low or deep),
        )

    @property
    def shares_keys(self) -> bool:
        """Whether windows share keys without copies, by the kernel of `kernels.dropout`."""
        from tlinformer_jax.parallel.sharding import open_axes  # needs JAX

        fits = self.compute_dtype.itemsize == 2 and self.head_dim <= SHARING_WIDTH
        return fits and self.attention in ("auto", "deterministic") and is_nvidia_gpu() and not open_axes()

    @property
    def pairable(self) -> bool:
        """Whether windows can run in pairs: their histories are blocks of W_og rows, and one block fills z."""
        whole = isinstance(self.history_window, int) and self.history_window <= self.generation_window
        return self.windowed and whole and not (self.window_overlap or self.causal_history)

    @property
    def always_observes(self) -> bool:
        """Whether z has a row if there is any history; with 'auto' it has none for a history of one token."""
        return self.history_window != "auto"

    def observed_rows(self, history: int) -> int:
        """Returns the rows of z for a history of `history` tokens: W_oh, or fewer if the history is shorter."""
        if history <= 0:
            return 0
        if self.history_window == "auto":
            return min(history, 8 * math.floor((12 * math.log(history) + 7) / 8))
        return min(history, int(self.history_window))


def _dtype_name(value: Any) -> str:
    import jax.numpy as jnp

    try:
        return jnp.dtype(value).name
    except (TypeError, ValueError):
        raise ConfigError("model.dtype", value, f"must be one of {', '.join(COMPUTE_DTYPES)}") from None


def _plan_of(fields: Any) -> ExecutionPlan:
    try:
        return ExecutionPlan(**fields)
    except TypeError:
        names = ", ".join(field.name for field in dataclasses.fields(ExecutionPlan))
        allowed = f"{one_of(*MEMORY).allowed}, or hold fields of an ExecutionPlan: {names}"
        raise ConfigError("model.memory", fields, allowed) from None
