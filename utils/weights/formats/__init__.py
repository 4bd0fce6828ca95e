"""Readers and writers of weights files; none of them runs anything that a file names."""
