"""Careful reading of others' files, and atomic replacement of folders."""
