"""Peak speeds of accelerators, from their makers' datasheets, for a model FLOPs utilisation (MFU)."""

# Dense bfloat16 products, FLOP/s per device as JAX counts devices, by a part of `device_kind` in lower case; the
# first that fits decides. NVIDIA: the datasheets of A100, H100, H200, L4 and B200, which state twice these figures
# "with sparsity". TPU: the "System architecture" pages of cloud.google.com/tpu/docs, per chip (v2, v3: per core).
PEAKS = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("gh200", 989e12),
    ("b200", 2250e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("l4", 121e12),
    ("tpu v6", 918e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v4", 275e12),
    ("tpu v3", 61.5e12),
    ("tpu v2", 22.5e12),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak of a device in products of `dtype`, FLOP/s; None where it is not known or dtype is no half precision."""
    if dtype not in ("bfloat16", "float16"):
        return None
    kind = device_kind.lower()
    return next((peak for part, peak in PEAKS if part in kind), None)
