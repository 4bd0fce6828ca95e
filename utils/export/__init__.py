"""Networks for other runtimes: `python -m utils.export WEIGHTS --out=FOLDER`."""
