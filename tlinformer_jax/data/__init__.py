"""Turns text, or the caller's own token ids, into batches.

sources       the split that a configuration names: the one entry point
files         text files and their documents; wikitext103, tfds: other texts; domains: images, letters, sound
tokenizers    text to ids and back; subwords: tokenizers with learned vocabularies
streams       a split as one row of tokens, made from text; documents: the documents of such a row
cache         stores tokenised splits
batches       batches from a split, read ahead
tasks         generated samples and their batches; needles: facts hidden in text
given         token ids from the caller; ordered: training on an iterable of them
"""
