"""What a model costs: operations, memory and bytes sent, counted before it runs."""
