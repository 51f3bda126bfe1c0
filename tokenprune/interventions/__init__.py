"""Built-in interventions, one a file; see `tokenprune.registry.INTERVENTIONS`."""
