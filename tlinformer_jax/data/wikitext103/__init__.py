"""WikiText-103: rows of its zip or parquet files, prepared once by a TFDS builder, read without TensorFlow."""
