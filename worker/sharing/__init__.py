"""So that each file crosses the internet, and each block is converted, once per cluster."""
