"""What `python -m data.check` looks for, one concern a file."""
