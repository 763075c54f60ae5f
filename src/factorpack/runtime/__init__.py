"""How a factored weight is applied: `reference` defines it in NumPy, `packed` does it inside a torch module."""
