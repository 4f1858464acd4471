"""The shape of a Gated DeltaNet layer that has as many parameters as a standard layer."""

import dataclasses

# Widths of a head; the first that gives at least two heads is used. The kernels support no others.
WIDTHS = (128, 64)
# Positions that the short convolution reads.
CONVOLUTION = 4
# Largest difference in parameters from a standard layer, as a fraction.
EQUAL = 1e-3


@dataclasses.dataclass(frozen=True)
class DeltaShape:
    """Shape of a Gated DeltaNet layer.

    Attributes:
      heads: number of heads; each has its own state, [width, width].
      width: features of a head's queries, keys and values.
      feed_forward: F of the layer.
    """

    heads: int
    width: int
    feed_forward: int

    @property
    def inner(self) -> int:
        """Features of all heads together."""
        return self.heads * self.width

    @property
    def state_size(self) -> int:
        """Numbers in the layer's state."""
        return self.inner * self.width


def delta_shape(d_model: int, head_dim: int, feed_forward: int) -> DeltaShape:
    """Returns the shape of the layer that replaces a standard layer with `feed_forward` inner features.

    Heads are 128 features wide if that makes two heads or more, else 64, else `head_dim`; there are enough heads to
    cover d_model. F makes the number of parameters equal to the standard layer's, to within 0.1%. It is a multiple of
    the largest power of two up to 64 that allows this. F is below 1 if the mixer needs all parameters.
    """
    width = next((width for width in WIDTHS if 2 * width <= d_model), head_dim)
    heads = -(-d_model // width)
    inner = heads * width
    # Both have 5 * d_model more parameters: two LayerNorms and the output projection's bias.
    standard = 4 * d_model**2 + 3 * d_model + 3 * d_model * feed_forward
    mixer = 5 * d_model * inner + 3 * CONVOLUTION * inner + 2 * d_model * heads + 2 * heads + width
    exact, allowed = (standard - mixer) / (3 * d_model), EQUAL * (standard + 5 * d_model)
    sizes = [multiple * round(exact / multiple) for multiple in (64, 32, 16, 8, 4, 2)]
    fitting = [size for size in sizes if size > 0 and abs(size - exact) * 3 * d_model <= allowed]
    return DeltaShape(heads, width, fitting[0] if fitting else round(exact))
