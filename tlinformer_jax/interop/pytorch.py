"""The four models in PyTorch, in one file that needs only torch, so that it can be copied to where it is used.

A model trained with tlinformer_jax, written by `tlinformer convert --workdir=DIR --to=model.safetensors`:

    from pytorch import from_safetensors

    model = from_safetensors("model.safetensors")
    logits = model(tokens)  # int64 [batch, length] -> float32 [batch, length, V]
    longer = model.generate(tokens, max_new_tokens=100)  # greedy

Parameters have the names in the file, so `torch.save(model.state_dict(), "model.pt")` makes a file that
`tlinformer convert --from=model.pt` reads back. This version is easy to read and to use, not the fastest.
"""

import dataclasses
import json
import math
import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHITECTURES = ("tlinformer", "tconstformer", "transformer", "sliding_window")
# The token shift's vector is its parameter times this factor, so that a small learning rate changes it enough.
SHIFT_SCALE = 10.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a model; its fields have the names of tlinformer_jax's `ModelConfig`."""

    architecture: str  # one of ARCHITECTURES
    vocab_size: int  # V
    d_model: int  # D, the width
    num_heads: int  # of attention, each of d_h = D / num_heads features
    num_blocks: int  # B
    hidden_depth: int  # H, layers of a block between `compress` and `restore`
    d_ff: int  # width of the feed-forward
    history_window: int | str  # W_oh, rows of the compressed history; 'auto' grows with the history
    generation_window: int  # W_og, tokens per window
    dropout: float = 0.0  # in training, on attention weights and on the feed-forward's output
    token_shift: bool = False  # the first layer's keys add a multiple of the previous token's embedding
    longest_wavelength: int = 0  # do not rotate feature pairs that need more positions for a full turn; 0: rotate all
    window_overlap: int = 0  # o; later windows also run the o tokens before them

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            allowed = f"must be one of {', '.join(ARCHITECTURES)} in PyTorch"
            raise ValueError(f"architecture = {self.architecture!r}: {allowed}")

    @property
    def num_layers(self) -> int:
        return self.num_blocks * (self.hidden_depth + 2)

    @property
    def windowed(self) -> bool:
        return self.architecture in ("tlinformer", "tconstformer")

    @property
    def reach(self) -> int | None:
        """Number of positions that a query of a baseline can read; None for all before it."""
        return int(self.history_window) + self.generation_window if self.architecture == "sliding_window" else None

    def window_start(self, position: int) -> int:
        """Returns n, the first row that runs in the window that predicts from `position`."""
        return max(0, position - position % self.generation_window - self.window_overlap)

    def observed_start(self, n: int) -> int:
        """Returns h, the first of the last W_oh of n rows."""
        width = self.history_window
        if width == "auto":
            width = 8 * math.floor((12 * math.log(n) + 7) / 8) if n else 0
        return max(0, n - int(width))


class KeyValue(NamedTuple):
    """Keys (rotated) and values of some rows, each [batch, heads, rows, d_h]."""

    K: Tensor
    V: Tensor


def attend(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Computes exact softmax attention; 0 if there are no keys."""
    if K.shape[-2] == 0:
        return torch.zeros_like(Q)
    return F.scaled_dot_product_attention(Q, K, V, mask, dropout)


def attend_causal(Q: Tensor, K: Tensor, V: Tensor, reach: int | None = None, dropout: float = 0.0) -> Tensor:
    """Computes attention for queries of the last rows of K, each of which reads `reach` rows up to its own."""
    rows = torch.arange(K.shape[-2], device=K.device)
    distance = rows[K.shape[-2] - Q.shape[-2] :, None] - rows
    return attend(Q, K, V, (distance >= 0) & (distance < (reach or len(rows) + 1)), dropout)


def rotations(config: Config, length: int, start: int = 0) -> Tensor:
    """Returns cosines and sines of RoPE's angles at positions start .. length - 1: [2, positions, d_h / 2].

    Uses float64, because at a million positions a float32 angle is off by 0.05.
    """
    width = config.d_model // config.num_heads
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if config.longest_wavelength:
        frequencies[frequencies * config.longest_wavelength < 2 * math.pi] = 0
    angles = torch.outer(torch.arange(start, length, dtype=torch.float64), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(heads: Tensor, rope: Tensor) -> Tensor:
    """Rotates features 2i and 2i + 1 of [..., rows, d_h] as pair i, in float32."""
    cos, sin = rope.to(heads.device, torch.float32)
    first, second = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(heads)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 y) * w3 y)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.w3 = nn.Linear(config.d_model, config.d_ff, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(y)) * self.w3(y))


class Layer(nn.Module):
    """The layer that all architectures use in every role, as two functions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.norm1 = nn.LayerNorm(config.d_model)
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, u: Tensor, rope: Tensor, key_rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns Q, K, V [batch, heads, rows, d_h], Q and K rotated; K is made from `key_rows` if given."""
        Q, K, V = self.qkv_proj(self.norm1(u)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return rotate(Q, rope), rotate(K, rope) if key_rows is None else self.project(key_rows, rope)[1], V

    def update(self, u: Tensor, attended: Tensor) -> Tensor:
        """Applies output projection and feed-forward, each added to its input."""
        v = u + self.out_proj(attended.transpose(1, 2).flatten(-2))
        return v + self.dropout(self.ffn(self.norm2(v)))

    @property
    def attention_dropout(self) -> float:
        return self.dropout.p if self.training else 0.0


def layers_of(module: nn.Module) -> list[Layer]:
    """Lists a module's layers in the order in which they run."""
    return [part for part in module.modules() if isinstance(part, Layer)]


class Stream(NamedTuple):
    """Rows of one of the block's streams C, z and x, with their projections in the layer that reads them."""

    rows: Tensor
    Q: Tensor
    K: Tensor
    V: Tensor

    @classmethod
    def of(cls, layer: Layer, rows: Tensor, rope: Tensor, key_rows: Tensor | None = None) -> "Stream":
        return cls(rows, *layer.project(rows, rope, key_rows))

    def after(self, h: int) -> "Stream":
        """Returns the rows from h on."""
        return Stream(self.rows[:, h:], self.Q[:, :, h:], self.K[:, :, h:], self.V[:, :, h:])


# The three kinds of layer, section 3 of the paper: C is the history, z its compressed observation window, x the
# generation window. The first window has no history, and attention to no keys is 0.


def compress(layer: Layer, C: Stream, z: Stream, x: Stream, x_reads_C: bool = True) -> tuple[Tensor, Tensor]:
    """z = update(C[h:], attend(Qc[h:], Kc, Vc))
    x = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kc, Vc))

    The argument z has rows h .. n - 1 of C. TConstFormer's x does not read C.
    """
    p = layer.attention_dropout
    z_attends = attend(z.Q, C.K, C.V, dropout=p)
    x_attends = attend_causal(x.Q, x.K, x.V, dropout=p)
    if x_reads_C:
        x_attends = x_attends + attend(x.Q, C.K, C.V, dropout=p)
    return layer.update(z.rows, z_attends), layer.update(x.rows, x_attends)


def hidden(layer: Layer, z: Stream, x: Stream) -> tuple[Tensor, Tensor]:
    """z' = update(z, attend(Qz, Kz, Vz))
    x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))
    """
    p = layer.attention_dropout
    z_attends = attend(z.Q, z.K, z.V, dropout=p)
    x_attends = attend_causal(x.Q, x.K, x.V, dropout=p) + attend(x.Q, z.K, z.V, dropout=p)
    return layer.update(z.rows, z_attends), layer.update(x.rows, x_attends)


def restore(layer: Layer, C: Stream, z: Stream, x: Stream) -> tuple[Tensor, Tensor]:
    """C' = update(C, attend(Qc, Kz, Vz)), where Qc is the query of `compress`
    x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))
    """
    p = layer.attention_dropout
    C_attends = attend(C.Q, z.K, z.V, dropout=p)
    x_attends = attend_causal(x.Q, x.K, x.V, dropout=p) + attend(x.Q, z.K, z.V, dropout=p)
    return layer.update(C.rows, C_attends), layer.update(x.rows, x_attends)


class Block(nn.Module):
    """A `compress` layer, H `hidden` layers, and a `restore` layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.compress_context_layer = Layer(config)
        self.hidden_layers = nn.ModuleList(Layer(config) for _ in range(config.hidden_depth))
        self.restore_context_shape_layer = Layer(config)

    def forward(
        self, C: Tensor, x: Tensor, rope: Tensor, last: bool, key_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[KeyValue]]:
        """Returns the next C [batch, n, D] and x [batch, m, D], and what x reads of the history in each layer.

        `rope` and `key_rows`, from which the first block makes its keys, have all n + m rows. The last block returns a
        C without rows, because nothing reads it.
        """
        config, (first, *middle, final) = self.config, layers_of(self)
        n, h = C.shape[1], config.observed_start(C.shape[1])
        C_rope, z_rope, x_rope = rope[:, :n], rope[:, h:n], rope[:, n:]
        old, new = (None, None) if key_rows is None else (key_rows[:, :n], key_rows[:, n:])
        history, window = Stream.of(first, C, C_rope, old), Stream.of(first, x, x_rope, new)
        x_reads_C = config.architecture == "tlinformer"
        seen = history if x_reads_C else history.after(n)
        read = [KeyValue(seen.K, seen.V)]
        z, x = compress(first, history, history.after(h), window, x_reads_C)
        for layer in middle:
            observed, window = Stream.of(layer, z, z_rope), Stream.of(layer, x, x_rope)
            read.append(KeyValue(observed.K, observed.V))
            z, x = hidden(layer, observed, window)
        observed, window = Stream.of(final, z, z_rope), Stream.of(final, x, x_rope)
        read.append(KeyValue(observed.K, observed.V))
        C, x = restore(final, history.after(n if last else 0), observed, window)
        return C, x, read


class LanguageModel(nn.Module):
    """A language model: tied embedding, blocks or layers, final LayerNorm, head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.token_shift:
            self.token_shift = nn.Parameter(torch.zeros(config.d_model))
        kind, count = (Block, config.num_blocks) if config.windowed else (Layer, config.num_layers)
        layers, norm = nn.ModuleList(kind(config) for _ in range(count)), nn.LayerNorm(config.d_model)
        head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        head.weight = self.embedding.weight
        self.transformer = nn.ModuleDict({"transformer_layers": layers, "norm": norm, "lm_head": head})
        # As in the paper: normal with 0.02, less for what is added to the residual stream; biases 0.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("qkv_proj.weight", "out_proj.weight", "w2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits [batch, length, V]; row i predicts token i + 1."""
        embedded, rope = self.embedding(tokens), rotations(self.config, tokens.shape[1])
        if self.config.windowed:
            size, windows = self.config.generation_window, []
            for first in range(0, tokens.shape[1], size):
                n = self.config.window_start(first)
                windows.append(self._window(embedded[:, : first + size], n, rope)[0][:, first - n :])
            return self._head(torch.cat(windows, dim=1))
        x, key_rows = embedded, self._key_rows(embedded)
        for layer in layers_of(self):
            (Q, K, V), key_rows = layer.project(x, rope, key_rows), None
            x = layer.update(x, attend_causal(Q, K, V, self.config.reach, layer.attention_dropout))
        return self._head(x)

    def _key_rows(self, embedded: Tensor) -> Tensor | None:
        """Returns the rows from which the first layer's keys are made with a token shift; None without one."""
        if not self.config.token_shift:
            return None
        return embedded + SHIFT_SCALE * self.token_shift * F.pad(embedded, (0, 0, 1, 0))[:, :-1]

    def _window(self, embedded: Tensor, n: int, rope: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Runs rows n, n + 1, ... after the history of n rows through all blocks."""
        C, x, key_rows = embedded[:, :n], embedded[:, n:], self._key_rows(embedded)
        read: list[KeyValue] = []
        for index, block in enumerate(part for part in self.modules() if isinstance(part, Block)):
            last = index == self.config.num_blocks - 1
            C, x, of_block = block(C, x, rope[:, : embedded.shape[1]], last, key_rows)
            read, key_rows = read + of_block, None
        return x, read

    def _head(self, x: Tensor) -> Tensor:
        return self.transformer["lm_head"](self.transformer["norm"](x))

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """Continues tokens [batch, length >= 1] with the likeliest ones."""
        start = None
        for _ in range(max_new_tokens):
            last = tokens.shape[1] - 1
            n = self.config.window_start(last) if self.config.windowed else 0
            if n != start:
                start, done, (read, own) = n, n, self._slide(tokens[:, :n])
            logits, own = self._step(tokens, done, read, own)
            done, tokens = last + 1, torch.cat([tokens, logits.argmax(-1)], dim=1)
        return tokens

    def _slide(self, history: Tensor) -> tuple[list[KeyValue], list[KeyValue]]:
        """Returns what the next window reads in each layer, and the window's own keys and values: none yet."""
        embedded, n, heads = self.embedding(history), history.shape[1], self.config.num_heads
        empty = embedded.new_zeros(len(history), heads, 0, embedded.shape[-1] // heads)
        none = [KeyValue(empty, empty)] * self.config.num_layers
        return (self._window(embedded, n, rotations(self.config, n))[1] if n else none), none

    def _step(
        self, tokens: Tensor, position: int, read: list[KeyValue], own: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """Returns logits [batch, 1, V] after the tokens, new from `position` on, and the window's keys and values.

        This is the second line of each of the three equations, and a baseline's only one.
        """
        first = max(position - 1, 0)  # the token shift reads the token before the new tokens
        embedded, rope = self.embedding(tokens[:, first:]), rotations(self.config, tokens.shape[1], position)
        x, key_rows, kept = embedded[:, position - first :], self._key_rows(embedded), []
        key_rows = None if key_rows is None else key_rows[:, position - first :]
        for layer, history, before in zip(layers_of(self), read, own):
            (Q, K, V), key_rows = layer.project(x, rope, key_rows), None
            K, V = torch.cat([before.K, K], dim=2), torch.cat([before.V, V], dim=2)
            x = layer.update(x, attend_causal(Q, K, V, self.config.reach) + attend(Q, *history))
            rows = -(self.config.reach or K.shape[2])
            kept.append(KeyValue(K[:, :, rows:], V[:, :, rows:]))
        return self._head(x[:, -1:]), kept


def from_safetensors(path: str | pathlib.Path, config: Config | None = None) -> LanguageModel:
    """Loads a model that `tlinformer convert --to` wrote; give `config` if the file has none."""
    metadata, arrays = read_safetensors(path)
    if config is None:
        if "tlinformer" not in metadata:
            raise ValueError(f"{path}: does not contain the model's configuration; give config=Config(...)")
        shape = json.loads(metadata["tlinformer"])
        if (experts := shape.pop("num_experts", 0)) > 1:
            raise ValueError(f"{path}: num_experts = {experts}: must be 0, this module has no experts")
        config = Config(**shape)
    model = LanguageModel(config)
    model.load_state_dict(arrays)
    return model.train(False)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path: str | pathlib.Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads metadata and arrays: 8 bytes with the header's length, JSON, the arrays' bytes."""
    data = torch.from_file(str(path), size=pathlib.Path(path).stat().st_size, dtype=torch.uint8)
    length = int.from_bytes(bytes(data[:8].tolist()), "little")
    arrays, name = {}, "its header"
    try:
        header = dict(json.loads(bytes(data[8 : 8 + length].tolist())))
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            first, end = (8 + length + offset for offset in entry["data_offsets"])
            arrays[name] = data[first:end].view(DTYPES[entry["dtype"]]).view(entry["shape"])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        allowed = f"must be a whole safetensors file, of {', '.join(DTYPES)}"
        raise ValueError(f"{path}: {allowed}; {name} cannot be read") from None
    return metadata, arrays
