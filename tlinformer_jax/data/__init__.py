"""From text, or the caller's own token ids, to batches.

sources       what a configuration's split is made of: the one entry point
files         text files and their documents; wikitext103, tfds: other texts; domains: images, letters, sound
tokenizers    text to ids and back; subwords: those with learned vocabularies
streams       a split as one row of tokens, and how text becomes it
cache         tokens are cached
batches       batches are made of it, and read ahead
tasks         samples that are generated, and their batches; needles: what is hidden in text
given         token ids that the caller brings; ordered: training on an iterable of them
"""
