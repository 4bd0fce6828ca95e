"""What PyTorch versions name or do differently, decided by asking for the feature."""
