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
# The vectors of token shift and key taps are parameters times this factor: a small learning rate changes them enough.
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
    key_taps: int = 0  # K; later blocks' keys of the history add multiples of the K previous tokens' embeddings
    longest_wavelength: int = 0  # do not rotate feature pairs that need more positions for a full turn; 0: rotate all
    window_overlap: int = 0  # o; later windows also run the o tokens before them
    causal_history: bool = False  # rows of z are computed like those of x, in one softmax; see `Block.causal_history`

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
        """Returns n, the first row that runs in the window that predicts from `position`; 0 for a baseline."""
        return max(0, position - position % self.generation_window - self.window_overlap) if self.windowed else 0

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
    """The layer that all architectures use in every role, as two functions; `taps` is the number of its key taps."""

    def __init__(self, config: Config, taps: int = 0) -> None:
        super().__init__()
        self.key_taps = nn.Parameter(torch.zeros(taps, config.d_model)) if taps else None
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


def weighted_sum(vectors: Tensor, embedded: Tensor) -> Tensor:
    """Returns the sum over k = 1, 2, ... of SHIFT_SCALE * vectors[k - 1] * e_(t-k) for each row of a sequence."""
    length = embedded.shape[1]
    before = [F.pad(embedded, (0, 0, back, 0))[:, :length] for back in range(1, len(vectors) + 1)]
    return SHIFT_SCALE * (vectors[:, None, None] * torch.stack(before)).sum(0)


def layers_of(module: nn.Module) -> list[Layer]:
    """Lists a module's layers in the order in which they run."""
    return [part for part in module.modules() if isinstance(part, Layer)]


# The layers of section 3 of the paper: C is the history, z its compressed observation window, x the generation window.
#
#     compress:  z = update(C[h:], attend(Qc[h:], Kc, Vc))    x reads C (in TConstFormer nothing)
#     hidden:    z' = update(z, attend(Qz, Kz, Vz))           x reads z
#     restore:   C' = update(C, attend(Qc, Kz, Vz))           x reads z
#
# In each of them x = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, K, V)), where K and V are those of what x reads.
# C and z do not depend on x, so `Block.history` computes them and `LanguageModel.window` computes x.


class Block(nn.Module):
    """A `compress` layer, H `hidden` layers, and a `restore` layer."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.config = config
        self.compress_context_layer = Layer(config, taps=config.key_taps if index else 0)
        self.hidden_layers = nn.ModuleList(Layer(config) for _ in range(config.hidden_depth))
        self.restore_context_shape_layer = Layer(config)

    def history(self, C: Tensor, rope: Tensor, key_rows: Tensor | None, last: bool) -> tuple[Tensor, list[KeyValue]]:
        """Returns the next C [batch, n, D], without rows in the last block, and what x reads in each layer."""
        (first, *middle, final), n = layers_of(self), C.shape[1]
        h, p = self.config.observed_start(n), first.attention_dropout
        Qc, Kc, Vc = first.project(C, rope, key_rows)
        if self.config.causal_history:
            return self.causal_history(C, Qc, KeyValue(Kc, Vc), rope, last)
        z = first.update(C[:, h:], attend(Qc[:, :, h:], Kc, Vc, dropout=p))
        seen = slice(0 if self.config.architecture == "tlinformer" else n, n)
        read = [KeyValue(Kc[:, :, seen], Vc[:, :, seen])]
        for layer in middle:
            Qz, Kz, Vz = layer.project(z, rope[:, h:])
            read.append(KeyValue(Kz, Vz))
            z = layer.update(z, attend(Qz, Kz, Vz, dropout=p))
        _, Kz, Vz = final.project(z, rope[:, h:])
        read.append(KeyValue(Kz, Vz))
        rows = slice(n if last else 0, n)
        return final.update(C[:, rows], attend(Qc[:, :, rows], Kz, Vz, dropout=p)), read

    def causal_history(
        self, C: Tensor, Qc: Tensor, of_c: KeyValue, rope: Tensor, last: bool
    ) -> tuple[Tensor, list[KeyValue]]:
        """Returns what `history` does, where C are the rows before h and then z, which the next block continues.

        Each row of z reads rows up to its own. Rows before h do not read z, but what they read in their own window.
        """
        (first, *others), h, read = layers_of(self), self.config.observed_start(C.shape[1]), [of_c]
        p = first.attention_dropout
        z = first.update(C[:, h:], attend_causal(Qc[:, :, h:], *of_c, dropout=p))
        for layer in others:
            Qz, Kz, Vz = layer.project(z, rope[:, h:])
            read.append(KeyValue(Kz, Vz))
            z = layer.update(z, attend_causal(Qz, Kz, Vz, dropout=p))
        if last:
            return z[:, :0], read
        Qc, Kc, Vc = (heads[:, :, :h] for heads in (Qc, *of_c))
        before = first.update(C[:, :h], attend(Qc, Kc, Vc, self.own_window(h, C.device), p))
        return torch.cat([before, z], dim=1), read

    def own_window(self, rows: int, device: torch.device) -> Tensor:
        """Returns which of the first rows each of them read when it was in the generation window: [queries, keys]."""
        row = torch.arange(rows, device=device)
        starts = [self.config.observed_start(self.config.window_start(position)) for position in range(rows)]
        return (row >= torch.tensor(starts, dtype=torch.long, device=device)[:, None]) & (row <= row[:, None])


class LanguageModel(nn.Module):
    """A language model: tied embedding, blocks or layers, final LayerNorm, head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.token_shift:
            self.token_shift = nn.Parameter(torch.zeros(config.d_model))
        if config.windowed:
            layers = nn.ModuleList(Block(config, index) for index in range(config.num_blocks))
        else:
            layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        norm = nn.LayerNorm(config.d_model)
        head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        head.weight = self.embedding.weight
        self.transformer = nn.ModuleDict({"transformer_layers": layers, "norm": norm, "lm_head": head})
        # As in the paper: normal with 0.02, less for what is added to the residual stream; biases 0.
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                residual = name.endswith(("qkv_proj.weight", "out_proj.weight", "w2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits [batch, length, V]; row i predicts token i + 1."""
        embedded, length, windows = self.embedding(tokens), tokens.shape[1], []
        size = self.config.generation_window if self.config.windowed else length
        nothing = self.history(embedded[:, :0])
        for first in range(0, max(length, 1), max(size, 1)):  # no tokens give no logits
            n = self.config.window_start(first)
            x, _ = self.window(embedded[:, max(n - 1, 0) : first + size], n, self.history(embedded[:, :n]), nothing)
            windows.append(x[:, first - n :])
        return self.head(torch.cat(windows, dim=1))

    def history(self, embedded: Tensor) -> list[KeyValue]:
        """Returns what the window after the embedded history [batch, n, D] reads in each layer."""
        n, heads = embedded.shape[1], self.config.num_heads
        if n == 0:
            none = embedded.unflatten(-1, (heads, -1)).transpose(1, 2)
            return [KeyValue(none, none)] * self.config.num_layers
        C, rope, key_rows = embedded, rotations(self.config, n), self.key_rows(embedded)
        read: list[KeyValue] = []
        blocks = [part for part in self.modules() if isinstance(part, Block)]
        for block in blocks:
            if (taps := block.compress_context_layer.key_taps) is not None:
                key_rows = C + weighted_sum(taps, embedded)
            C, of_block = block.history(C, rope, key_rows, last=block is blocks[-1])
            read, key_rows = read + of_block, None
        return read

    def key_rows(self, embedded: Tensor) -> Tensor | None:
        """Returns the rows from which the first layer's keys are made with a token shift; None without one."""
        return embedded + weighted_sum(self.token_shift[None], embedded) if self.config.token_shift else None

    def window(
        self, embedded: Tensor, start: int, read: list[KeyValue], own: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """Runs the rows of a window from position `start` on through all layers; a baseline's rows are all one window.

        Args:
          embedded: the embedded tokens, from the one before `start` on, which the token shift reads.
          read: what the rows read of the history in each layer.
          own: keys and values of the window's earlier rows; they are returned with those of the new rows.
        """
        before, key_rows, kept = min(start, 1), self.key_rows(embedded), []
        x, rope = embedded[:, before:], rotations(self.config, start + embedded.shape[1] - before, start)
        key_rows = None if key_rows is None else key_rows[:, before:]
        for layer, history, earlier in zip(layers_of(self), read, own):
            (Q, K, V), key_rows, p = layer.project(x, rope, key_rows), None, layer.attention_dropout
            K, V = torch.cat([earlier.K, K], dim=2), torch.cat([earlier.V, V], dim=2)
            rows = -(self.config.reach or K.shape[2])
            kept.append(KeyValue(K[:, :, rows:], V[:, :, rows:]))
            if self.config.causal_history:
                K, V = torch.cat([history.K, K], dim=2), torch.cat([history.V, V], dim=2)
                x = layer.update(x, attend_causal(Q, K, V, dropout=p))
            else:
                x = layer.update(x, attend_causal(Q, K, V, self.config.reach, p) + attend(Q, *history, dropout=p))
        return x, kept

    def head(self, x: Tensor) -> Tensor:
        return self.transformer["lm_head"](self.transformer["norm"](x))

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """Continues tokens [batch, length >= 1] with the likeliest ones."""
        start = None
        for _ in range(max_new_tokens):
            last = tokens.shape[1] - 1
            n = self.config.window_start(last)
            if n != start:  # the window slides
                start = done = n
                read, own = self.history(self.embedding(tokens[:, :n])), self.history(self.embedding(tokens[:, :0]))
            x, own = self.window(self.embedding(tokens[:, max(done - 1, 0) :]), done, read, own)
            done, tokens = last + 1, torch.cat([tokens, self.head(x[:, -1:]).argmax(-1)], dim=1)
        return tokens


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
