"""What networks and losses are made of; nothing here knows a dataset, a file or a process."""
