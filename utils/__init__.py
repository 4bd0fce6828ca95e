"""What a run needs around the network: device, processes, checkpoints, schedule, logs, metrics."""
