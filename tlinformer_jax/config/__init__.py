"""What a run is told: one frozen, validated dataclass for each section."""
