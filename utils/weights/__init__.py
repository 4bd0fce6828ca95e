"""Weights files of any known kind: recognised, read without running code, renamed, loaded."""
