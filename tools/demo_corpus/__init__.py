"""Demo corpus: domain recipes, package downloads, splits and corruption."""
