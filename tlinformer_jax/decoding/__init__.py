"""Generation: caches, prefill, step and slide, sampling, the generator."""
