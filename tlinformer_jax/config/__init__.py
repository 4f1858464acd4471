"""What a run is told: one frozen, validated dataclass for each section.

run           the section `train`, and a run's whole configuration: read, checked, stored, compared
model, data   the sections of these names; `mesh` is in parallel/mesh
recipes       what config files share: the rows of Table 1, our recipe
named         the config files that come with the package, by name
"""
