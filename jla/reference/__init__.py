"""The definitions: token by token, in float32, straight from the mathematics."""
