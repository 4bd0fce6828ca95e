"""Configuration, datasets, augmentation, target assignment and static batches."""
