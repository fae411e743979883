"""Storage: where parameters lie, and the checks at the door."""
