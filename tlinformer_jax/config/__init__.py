"""The configuration of a run: one frozen, validated dataclass for each section.

run                 reading, checking, storing and comparing whole configurations
model, train, data  the sections of these names
delta               the shape of Gated DeltaNet layers
execution           the plan by which a model is executed
recipes             functions for config files: the rows of Table 1, this project's recipe
named               finding and running config files, also those of the package by name
"""
