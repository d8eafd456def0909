"""Functions on addresses, arrays and integers, without tensors."""
