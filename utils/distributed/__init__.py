"""Several processes that train or score as one: from their start to their failures."""
