"""One training run: what it is made of, what it keeps, what it says; `train.py` is its loop."""
