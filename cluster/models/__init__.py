"""Models that ship inside the package. Data only."""
