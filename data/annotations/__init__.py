"""A COCO instances file, read, checked once and kept as flat arrays."""
