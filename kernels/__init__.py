"""Functions on addresses, arrays and integers; nothing here knows what a tensor is."""
