"""What stands behind people's commands: `data.check`, `data.convert`, `data.shapes`."""
