"""From weights as trained to weights as stored: one module per scheme."""
