"""What is found in pictures and videos, and what becomes of it; `utils.predictor` uses it."""
