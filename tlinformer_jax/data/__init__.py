"""From text, or the caller's own token ids, to batches.

sources       what a configuration's split is made of: the one entry point
files         text files and their documents; wikitext103, tfds, pydoc: other texts
encoding      text becomes tokens, by one of the tokenizers (subwords: those with learned vocabularies)
cache         tokens are cached
streams       a split as one row of tokens
batches       a batch is made of it
tasks         samples that are generated, and their batches; passkey: one of the tasks
given         token ids that the caller brings; ordered: training on an iterable of them
"""
